"""The scripts in tpu/: the exact output of their dry runs, and complete runs against a fake gcloud with local workers.

The fake keeps slices in a folder and runs ssh commands on this machine, each worker in its own home folder; so
everything but Google's side is real. A program on a worker can have its slice preempted. The workers get a small
repository that contains the scripts; each second the scripts sleep lasts a tenth.
"""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TPU = ROOT / "tpu"
GOLDEN = Path(__file__).parent / "dry_runs.txt"
SCRIPTS = sorted(TPU.glob("*.sh"))

CLOUD = """\
import os, pathlib, sys

root = pathlib.Path(os.environ["CLOUD"])
words, flags = [w for w in sys.argv[1:] if not w.startswith("--")], dict(
    w[2:].partition("=")[::2] for w in sys.argv[1:] if w.startswith("--")
)
with open(root / "calls", "a") as calls:
    print(" ".join(sys.argv[1:]), file=calls)
if words[0] == "config":
    sys.exit(print("project-of-config"))
if (root / "offline").exists():
    sys.exit("ERROR: network is unreachable")
verb, slice_file = words[-2] if words[-2] in ("create", "delete", "describe") else words[-1], root / "slice"
hosts = int(os.environ["HOSTS"])

def missing():
    print("ERROR: NOT_FOUND: Resource was not found", file=sys.stderr)
    sys.exit(1)

def home(i):
    return root / f"worker{i}"

if (root / "preempt").exists() and slice_file.exists():
    (root / "preempt").unlink()
    import signal
    for i in range(hosts):
        pid = home(i) / ".jaxgpt" / "pid"
        if pid.exists():
            try: os.killpg(int(pid.read_text()), signal.SIGKILL)
            except ProcessLookupError: pass
    slice_file.write_text("gone")

kinds = ("queued-resources", "tpu-vm", "instance-groups", "instance-templates", "resource-policies", "compute")
kind = next(k for k in kinds if k in words)
if kind in ("instance-templates", "resource-policies"):
    thing = root / kind
    if "create" in words:
        if thing.exists(): sys.exit("ERROR: already exists")
        thing.touch()
    elif thing.exists(): thing.unlink()
    else: missing()
elif "create" in words:
    if slice_file.exists(): sys.exit("ERROR: already exists")
    slice_file.write_text("waiting")
    import shutil
    for i in range(hosts):
        shutil.rmtree(home(i), ignore_errors=True)
        home(i).mkdir()
elif "delete" in words:
    if not slice_file.exists(): missing()
    slice_file.unlink()
elif "describe" in words or "list-instances" in words:
    if not slice_file.exists(): missing()
    state = slice_file.read_text()
    if state == "waiting": slice_file.write_text("ready")
    if flags["format"] == "value(NAME)":
        print("\\n".join(f"vm-{i}" for i in range(hosts)))
    elif kind == "instance-groups":
        print("\\n".join([{"waiting": "STAGING", "ready": "RUNNING", "gone": "STOPPED"}[state]] * hosts))
    elif kind == "tpu-vm":
        print({"ready": "READY", "gone": "PREEMPTED"}[state])
    else:
        print({"waiting": "WAITING_FOR_RESOURCES", "ready": "ACTIVE", "gone": "SUSPENDED"}[state])
else:
    if not slice_file.exists() or slice_file.read_text() != "ready": sys.exit(255)
    if kind == "tpu-vm":
        which = range(hosts) if flags["worker"] == "all" else [int(flags["worker"])]
    else:
        which = [int(words[-1].removeprefix("vm-").rstrip(":"))]
    import shutil, subprocess
    if "scp" in words:
        for i in which: shutil.copy(next(w for w in words if w.endswith(".gz")), home(i))
    else:
        command = ["bash", "-c", flags["command"]]
        places = [(home(i), {**os.environ, "HOME": str(home(i)), "WORKER": str(i)}) for i in which]
        running = [subprocess.Popen(command, cwd=cwd, env=env) for cwd, env in places]
        sys.exit(max(p.wait() for p in running))
"""
MAKE = '#!/bin/sh\nmkdir -p .venv/bin && ln -sf "$PYTHON_HERE" .venv/bin/python\n'  # reuse this environment
GCSFUSE = '#!/bin/sh\nrmdir "$2" 2>/dev/null; ln -sfn "$CLOUD/bucket" "$2"\n'
PYTHON3 = f'#!/bin/sh\nexec {sys.executable} -IS "$@"\n'  # like the system's: without packages
SLEEP = f'#!/bin/sh\nexec {shutil.which("sleep")} "0.$1"\n'
TAIL = f'#!/bin/sh\nexec {shutil.which("tail")} -s 0.1 "$@"\n'


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A git repository with the scripts, a tracked file, a new file, and an ignored file."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(TPU, folder / "tpu", ignore=shutil.ignore_patterns("*.py", "__pycache__", "slices"))
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (folder / "README.md").write_text("tracked")
    (folder / ".gitignore").write_text("ignored\n")
    subprocess.run(["git", "add", "README.md"], cwd=folder, check=True)
    for name in ("new", "ignored"):
        (folder / name).touch()
    return folder


@pytest.fixture(params=["queued", "mig"])
def cloud(request, repository, tmp_path):
    """An empty cloud. `cloud("create", ...)` runs a script against it."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tmp_path / "bucket").mkdir()
    stand_ins = {
        "gcloud": f"#!{sys.executable} -IS\n{CLOUD}",
        "make": MAKE,
        "gcsfuse": GCSFUSE,
        "python3": PYTHON3,
        "sleep": SLEEP,
        "tail": TAIL,
    }
    for name, text in stand_ins.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON_HERE": sys.executable,
        "CLOUD": str(tmp_path),
        "HOSTS": "2",
        "JAXGPT_POLL": "2",
        "JAXGPT_SLICES": str(tmp_path / "slices"),
        "JAXGPT_STOP_SECONDS": "300",
    }
    where = {"queued": "v5e:4x2", "mig": "v6e:4x2"}[request.param]  # two hosts

    def call(script, *arguments, check=None):
        done = subprocess.run(
            [call.tpu / f"{script}.sh", *arguments], env=environment, capture_output=True, text=True, timeout=120
        )
        if check is not None:
            assert done.returncode == check, done.stdout + done.stderr
        return done

    call.folder, call.tpu = tmp_path, repository / "tpu"
    call.where = ("--tpu", where, "--zone", "us-east5-b")
    call.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    call.environment = environment
    return call


def program(cloud, text):
    path = cloud.folder / "program.py"
    path.write_text(f"import os, pathlib, sys, time\ncloud = pathlib.Path(os.environ['CLOUD'])\n{text}")
    return ["--", "python", "-IS", str(path)]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def began(cloud):
    return (cloud.folder / "began0").exists() and (cloud.folder / "began1").exists()


def test_a_slice_from_its_creation_to_its_deletion(cloud):
    cloud("create", "one", *cloud.where, "--bucket", "gs://b", check=0)
    assert "slice 'one' already exists" in cloud("create", "one", *cloud.where, check=2).stderr
    cloud("setup", "one", check=0)
    travelled = {path.name for path in (cloud.folder / "worker1/jaxgpt").iterdir()}
    assert {"README.md", "new", "tpu"} <= travelled and "ignored" not in travelled
    done = cloud("run", "one", *program(cloud, "pathlib.Path('runs', os.environ['WORKER']).touch(); print('hello')"))
    assert done.returncode == 0 and "hello" in done.stdout, done.stderr
    assert {path.name for path in (cloud.folder / "bucket").iterdir()} == {"0", "1"}

    # A second run is refused while one is in progress, and --stop lets that one save.
    saves = """
import signal
def save(*_):
    (cloud / ('saved' + os.environ['WORKER'])).touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
(cloud / ('began' + os.environ['WORKER'])).touch()
time.sleep(100)
"""
    words = [cloud.tpu / "run.sh", "one", *program(cloud, saves)]
    first = subprocess.Popen(words, env=cloud.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: began(cloud))
    second = cloud("run", "one", *program(cloud, ""))
    assert second.returncode != 0 and "a run is in progress here" in second.stderr
    cloud("run", "one", "--stop", check=0)
    assert first.wait(60) == 75
    assert (cloud.folder / "saved0").exists() and (cloud.folder / "saved1").exists()

    cloud("delete", "one", check=0)
    assert not any((cloud.folder / left).exists() for left in ("slice", "instance-templates", "resource-policies"))
    assert "unknown slice 'one'" in cloud("delete", "one", check=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize("cloud", ["mig"], indirect=True)
def test_run_ends_with_the_worst_status_and_stops_the_others(cloud):
    cloud("create", "one", *cloud.where, check=0)
    cloud("setup", "one", check=0)
    waits = "sys.exit(3) if os.environ['WORKER'] == '1' else time.sleep(100)"
    done = cloud("run", "one", *program(cloud, waits), check=3)
    assert "a worker failed" in done.stderr


@pytest.mark.slow
def test_babysit_gets_the_slice_again_after_a_preemption(cloud):
    taken_once = """
first = not (cloud / 'bucket' / 'half').exists()
if os.environ['WORKER'] == '0' and first:
    pathlib.Path('runs/half').touch()
    (cloud / 'preempt').touch()
if first:
    time.sleep(100)
if os.environ['WORKER'] == '0':
    pathlib.Path('runs/whole').touch()
"""
    done = cloud("babysit", "one", *cloud.where, "--spot", "--bucket", "b", *program(cloud, taken_once), check=0)
    assert "the slice is gone" in done.stderr
    assert (cloud.folder / "bucket/whole").exists()
    assert not (cloud.folder / "slice").exists()
    creations = [line for line in cloud.calls() if " create one" in line and "resource-policies" not in line]
    assert len(creations) in (2, 4)  # created twice (each with a template, for a group)
    assert all("spot" in line.lower() for line in creations if "instance-groups" not in line)


@pytest.mark.slow
@pytest.mark.parametrize("cloud", ["queued"], indirect=True)
def test_babysit_goes_on_with_a_run_that_goes_on(cloud):
    text = """
with open(cloud / ('began' + os.environ['WORKER']), 'a') as file:
    file.write('x')
while not (cloud / 'enough').exists():
    time.sleep(0.1)
"""
    words = [cloud.tpu / "babysit.sh", "one", *cloud.where, "--bucket", "b", *program(cloud, text)]
    quiet = {"env": cloud.environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen(words, **quiet, start_new_session=True)
    wait_for(lambda: began(cloud))
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    calls = len(cloud.calls())
    second = subprocess.Popen(words, **quiet)
    wait_for(lambda: any("worker.sh show" in line for line in cloud.calls()[calls:]))
    (cloud.folder / "enough").touch()
    assert second.wait(60) == 0
    assert (cloud.folder / "began0").read_text() == "x", "started twice"
    assert not (cloud.folder / "slice").exists()


@pytest.mark.slow
@pytest.mark.parametrize("cloud", ["queued"], indirect=True)
def test_babysit_stops_at_a_mistake_and_after_three_failures(cloud):
    for status, rounds in ((2, 1), (3, 3)):
        text = f"""
if os.environ['WORKER'] == '0':
    with open(cloud / 'rounds{status}', 'a') as file:
        file.write('x')
sys.exit({status})
"""
        cloud("babysit", "one", *cloud.where, "--bucket", "b", *program(cloud, text), check=status)
        assert (cloud.folder / f"rounds{status}").read_text() == "x" * rounds
        assert not (cloud.folder / "slice").exists()


@pytest.mark.slow
def test_a_lost_connection_creates_nothing(cloud):
    (cloud.folder / "offline").touch()
    (cloud.folder / "calls").touch()
    words = [cloud.tpu / "babysit.sh", "one", *cloud.where, "--bucket", "b", *program(cloud, "")]
    waiting = subprocess.Popen(words, env=cloud.environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: sum("describe" in line or "list-instances" in line for line in cloud.calls()) >= 4)
    waiting.kill()
    waiting.wait()
    assert not any("create" in line for line in cloud.calls())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["create"], "tpu/create.sh NAME"),
        (["create", "Big_Name"], "lower-case"),
        (["create", "one"], "give --tpu"),
        (["create", "one", "--tpu", "v6e:4x4"], "no zone"),
        (["create", "one", "--tpu", "v6e-16", "--zone", "us-east5-b"], "v6e:2x4"),
        (["create", "one", "--tpu", "v5p:4x4", "--zone", "us-east5-b"], "three dimensions"),
        (["create", "one", "--tpu", "v6e:2x2x2", "--zone", "us-east5-b"], "two dimensions"),
        (["create", "one", "--tpu", "v9:2x2", "--zone", "us-east5-b"], "unknown generation"),
        (["create", "one", "--tpu", "v5e:4x4", "--zone", "us-east5-b", "--via", "mig"], "queued only"),
        (["create", "one", "--tpu", "tpu7x:2x2x2", "--zone", "us-east5-b", "--via", "queued"], "mig"),
        (["create", "one", "--tpu", "v5e:4x4", "--zone", "east"], "not a zone"),
        (["create", "one", "--tpu", "v5e:4x4", "--zone"], "needs a value"),
        (["create", "one", "--chips", "4"], "unknown option"),
        (["babysit", "one", "--tpu", "v5e:4x4", "--zone", "us-east5-b", "--project", "p", "--dry-run"], "after --"),
        (["babysit", "one", "--tpu", "v5e:4x4", "--zone", "us-east5-b", "--project", "p", "--", "sft"], "--bucket"),
    ],
)
def test_mistakes_are_named_before_anything_is_done(words, says, tmp_path):
    environment = {**os.environ, "JAXGPT_SLICES": str(tmp_path)}
    gcloud = tmp_path / "gcloud"
    gcloud.write_text("#!/bin/sh\necho called >&2\n")
    gcloud.chmod(0o755)
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    done = subprocess.run([TPU / f"{words[0]}.sh", *words[1:]], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stdout + done.stderr
    assert "called" not in done.stderr


def dry_runs() -> str:
    """Every script's dry run, for both ways of creating a slice, in the format of the golden file."""
    environment = {**os.environ, "JAXGPT_SLICES": "/nowhere"}
    queued = ["--tpu", "v5e:4x4", "--zone", "us-west4-a", "--project", "mine"]
    group = ["--tpu", "v6e:4x4", "--zone", "us-east5-b", "--project", "mine"]
    one_host = ["--tpu", "v6e:2x4", "--zone", "us-east5-b", "--project", "mine"]
    seven = ["--tpu", "tpu7x:2x2x2", "--zone", "us-central1-c", "--project", "mine"]
    run = ["--", "pretrain", "--preset", "gpu", "--run", "runs/it's mine"]
    calls = [
        ["create", "one", *queued, "--spot"],
        ["setup", "one", *queued, "--bucket", "gs://my-bucket"],
        ["run", "one", *queued, *run],
        ["run", "one", *queued, "--stop"],
        ["delete", "one", *queued],
        ["create", "one", *group, "--", "--network=inner"],
        ["setup", "one", *group],
        ["run", "one", *group, "--", "python", "mine.py"],
        ["delete", "one", *group],
        ["create", "one", *one_host, "--spot"],
        ["create", "one", *one_host, "--via", "queued"],
        ["create", "one", *seven],
        ["create", "one", "--tpu", "v4:2x2x2", *queued[2:]],
        ["create", "one", "--tpu", "v5p:2x2x2", *queued[2:], "--via", "queued"],
        ["babysit", "one", *one_host, "--spot", "--bucket", "my-bucket", *run],
    ]
    text = ""
    for name, *arguments in calls:
        done = subprocess.run(
            [TPU / f"{name}.sh", *arguments, "--dry-run"]
            if "--" not in arguments
            else [
                TPU / f"{name}.sh",
                *arguments[: arguments.index("--")],
                "--dry-run",
                *arguments[arguments.index("--") :],
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        text += f"$ tpu/{name}.sh {' '.join(arguments)}\n{done.stdout}\n"
    return text


def test_dry_runs_print_the_exact_commands():
    """After an intended change, run python -m tests.tpu.test_scripts to rewrite the file, and read its diff."""
    assert dry_runs() == GOLDEN.read_text()


@pytest.fixture
def cluster(tmp_path):
    """`cluster(1, 2, ...)` submits slurm.sbatch to a fake Slurm whose srun ends with these statuses, one call after
    another. Returns the script's own status and the calls: "srun CPUS_PER_TASK ARGUMENTS" or "scontrol ARGUMENTS"."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/pretrain.py").touch()
    stand_ins = {
        ".venv/bin/python": "#!/bin/sh\n",
        "bin/srun": '#!/bin/sh\necho srun "$SRUN_CPUS_PER_TASK" "$@" >>calls\n'
        'read -r code <statuses; sed -i 1d statuses; exit "$code"\n',
        "bin/scontrol": '#!/bin/sh\necho scontrol "$@" >>calls\n',
        "bin/sleep": '#!/bin/sh\necho sleep "$@" >>calls\n',
    }
    for name, text in stand_ins.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def submit(*statuses):
        (tmp_path / "calls").unlink(missing_ok=True)
        (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        command = ["bash", TPU / "slurm.sbatch", "pretrain", "--run", "runs/it's mine"]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **slurm}, capture_output=True, timeout=60)
        return done.returncode, (tmp_path / "calls").read_text().splitlines()

    return submit


def test_slurm_gives_each_process_its_cores(cluster):
    """srun takes SRUN_CPUS_PER_TASK from its environment; what sbatch was told is only in SLURM_CPUS_PER_TASK."""
    _, calls = cluster(0)
    assert calls[0].startswith("srun 8 ") and calls[0].endswith("--distributed auto --run runs/it's mine")


@pytest.mark.parametrize("status", [75, 129, 143])
def test_slurm_requeues_a_job_that_was_told_to_stop(cluster, status):
    assert cluster(status)[1][1:] == ["scontrol requeue 7"]


def test_slurm_starts_all_processes_again_after_a_death_but_not_for_ever(cluster):
    """srun's status is the highest of all processes: 137 of the one that was killed, not 75 of its peers."""
    status, calls = cluster(137, 139, 0)
    assert status == 0 and [call.split()[0] for call in calls] == ["srun", "sleep", "srun", "sleep", "srun"]
    status, calls = cluster(137, 137, 137, 0)
    assert status == 137 and [call.split()[0] for call in calls] == ["srun", "sleep", "srun", "sleep", "srun"]


@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_slurm_ends_with_the_status_of_a_run_that_is_finished_or_failed(cluster, status):
    """One call of srun: neither a success, an error nor Ctrl-C is tried again."""
    found, calls = cluster(status)
    assert found == status and len(calls) == 1
    assert "--kill-on-bad-exit=0" in calls[0], "a SIGTERM would turn an error of one process into 75 of the others"


def test_kubernetes_does_not_try_again_what_the_user_must_fix():
    """Status 2 of the container fails its job for a reason of its own, on which the whole JobSet fails."""
    spec = yaml.safe_load((TPU / "jobset.yaml").read_text())["spec"]
    (job,) = (one["template"]["spec"] for one in spec["replicatedJobs"])
    (container,) = job["template"]["spec"]["containers"]
    statuses = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert job["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onExitCodes": statuses}]
    assert job["template"]["spec"]["restartPolicy"] == "Never", "Kubernetes refuses a podFailurePolicy otherwise"
    assert spec["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert spec["failurePolicy"]["maxRestarts"] > 0, "after anything else, such as a preemption, it is"


@pytest.mark.parametrize("analysis", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_scripts_are_executable_and_shellcheck_clean(analysis):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    files = [*(path for path in SCRIPTS if path.name != "lib.sh"), TPU / "slurm.sbatch"]  # all of them source lib.sh
    command = [shellcheck, "-xa", f"--extended-analysis={analysis}", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TPU)
    assert done.returncode == 0, done.stdout
    for path in SCRIPTS:
        assert path.name == "lib.sh" or path.stat().st_mode & stat.S_IXUSR, path


if __name__ == "__main__":
    GOLDEN.write_text(dry_runs())
