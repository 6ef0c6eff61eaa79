"""The house: packages import only from the floors below, nothing runs in a circle, names are found by guessing."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (  # a package imports itself and what stands above it in this list, nothing else of ours
    "errors files caches config structs",  # the ground floor: single modules
    "losses",
    "models",
    "decoding",
    "training",
    "rlhf",
    "data",
    "pretrained",
    "runs",
    "study",
    "web",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
BASE = {"chex", "flax", "jax", "numpy", "optax"}  # what the library needs without an extra
ARRAYS_ONLY = BASE - {"flax"}  # what the losses need
EXTRAS = {"grain", "matplotlib", "sklearn", "starlette", "tensorflow_datasets", "tokenizers", "tyro", "uvicorn"}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, anywhere in it; `from a import b` gives both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges(package: Path) -> dict[str, set[str]]:
    """For each dotted module of the package, the modules that it imports. A package counts as imported only where a
    name of its own is taken from it, not where one of its modules is."""
    files = {
        ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in package.rglob("*.py")
    }
    prefix, found = f"{package.name}.", {}
    for name, path in files.items():
        names = {i.removeprefix(prefix) for i in imports(path) if i.startswith(prefix)}
        taken = {i for i in names if i in files or i.rpartition(".")[0] not in files}
        own = {i.rpartition(".")[0] for i in names - taken}
        modules = names & files.keys()
        parents = {i.rpartition(".")[0] for i in modules}
        found[name] = ((modules - parents) | own) - {name, ""}
    return {name: targets for name, targets in found.items() if name}


def violations(package: Path) -> list[str]:
    graph = edges(package)
    texts = [f"{name} has no floor in tests/test_imports.py" for name in graph if name.split(".")[0] not in FLOOR]
    if not texts:
        for name, targets in graph.items():
            floor = FLOOR[name.split(".")[0]]
            texts += [
                f"{name} imports {target} from a floor above it"
                for target in sorted(targets)
                if FLOOR[target.split(".")[0]] > floor
            ]
    done: set[str] = set()
    while ready := {name for name, targets in graph.items() if name not in done and targets <= done}:
        done |= ready
    return texts + ([f"a circle among {sorted(graph.keys() - done)}"] if graph.keys() - done else [])


def test_packages_import_only_from_the_floors_below():
    assert violations(ROOT / "jaxgpt") == []


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        (
            {"losses/a": "def f():\n    import jaxgpt.rlhf.ppo", "rlhf/ppo": ""},
            "losses.a imports rlhf.ppo from a floor above it",
        ),
        (
            {"models/a": "from jaxgpt import training", "training/__init__": ""},
            "models.a imports training from a floor above it",
        ),
        (
            {"runs/run": "import jaxgpt.runs.cli", "runs/cli": "def f():\n    from jaxgpt.runs.run import Run"},
            "a circle among ['runs.cli', 'runs.run']",
        ),
        ({"newcomer": ""}, "newcomer has no floor in tests/test_imports.py"),
        ({"rlhf/ppo": "import jaxgpt.losses.kl", "losses/kl": "import jax"}, None),
        (
            {
                "decoding/__init__": "from jaxgpt.decoding.generate import generate",
                "decoding/generate": "from jaxgpt.decoding import sampling",
                "decoding/sampling": "",
            },
            None,
        ),
    ],
)
def test_the_check_sees(tmp_path, files, complaint):
    package = tmp_path / "jaxgpt"
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(text)
    assert violations(package) == ([complaint] if complaint else [])


def test_the_package_itself_imports_nothing():
    assert list(imports(ROOT / "jaxgpt" / "__init__.py")) == []


def test_no_two_modules_have_one_name():
    names = Counter(path.stem for path in (ROOT / "jaxgpt").rglob("*.py") if path.stem != "__init__")
    assert [name for name, count in names.items() if count > 1] == []


def test_losses_take_arrays_only():
    for path in (ROOT / "jaxgpt" / "losses").glob("*.py"):
        for module in imports(path):
            top, *below = module.split(".")
            known = top in ARRAYS_ONLY | sys.stdlib_module_names
            assert known or (top == "jaxgpt" and (not below or below[0] == "losses")), (path, module)


def loaded_by(program: str) -> set[str]:
    """What the interpreter really loads."""
    words = [sys.executable, "-c", f"{program}; import sys; print(*sys.modules)"]
    return set(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_losses_brings_in_nothing_else():
    """No flax, no tokenizer, no data library, none of our other modules."""
    loaded = loaded_by("import jaxgpt.losses, jaxgpt.losses.kl, jaxgpt.losses.returns, jaxgpt.losses.vocab_head")
    assert {name.split(".")[1] for name in loaded if name.startswith("jaxgpt.")} == {"losses"}
    assert not loaded & {"flax", "orbax", "rich", *EXTRAS}


def test_the_library_without_an_extra_brings_in_no_package_of_an_extra():
    assert not loaded_by("from jaxgpt import losses, models, decoding, training, rlhf") & EXTRAS


def test_the_library_does_not_know_the_experiments():
    for path in (ROOT / "jaxgpt").rglob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] in ("experiments", "tpu", "tests")], path


def test_experiments_stand_alone():
    for path in (ROOT / "experiments").rglob("*.py"):
        if path.stem not in ("assistant", "align") and path.parent.name != "bench":  # two sequences; what is measured
            assert not [name for name in imports(path) if name.split(".")[0] == "experiments"], path


def test_every_experiment_is_a_command():
    """Its last statement hands `main` to the command line: without it `python -m` would do nothing, in silence."""
    paths = [
        path for path in (ROOT / "experiments").rglob("*.py") if path.stem not in ("__init__", "harness", "stages")
    ]
    assert len(paths) > 20
    for path in paths:
        last = ast.parse(path.read_text()).body[-1]
        assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'", path


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo", "ppo"])
def test_a_stage_reads_as_a_methods_section(stage):
    """The loop, resuming and writing files live in `runs.loop`; what is left fits a page."""
    text = (ROOT / "experiments" / f"{stage}.py").read_text(encoding="utf-8")
    (main,) = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert main.end_lineno is not None and main.end_lineno - main.lineno + 1 <= 45, "main: at most 45 lines"
    assert len(text.splitlines()) <= 160, "the file: at most 160 lines"
