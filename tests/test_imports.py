"""Imports only point down (function-local ones included), and nothing runs in a circle."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = {
    0: "structs config checks",
    1: "losses kl returns vocab_head sampling model layers attention tokenizer optim sharding settings process "
    "progress guard",
    2: "decode speculative train lora data checkpoint run cli pretrained reward bench resume verify",
    3: "rollout evaluate dpo beam chat",
    4: "ppo through_reward report doctor web study",
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names.split()}
ARRAYS_ONLY = ("checks", "losses", "kl", "returns", "vocab_head")  # what people lift out
ARRAY_PACKAGES = {"jax", "optax", "chex", "numpy", "collections", "typing", "dataclasses", "functools", "math", "sys"}


@functools.cache
def imports(path: Path) -> list[str]:
    """Dotted names of everything a file imports, anywhere in it; `from a import b` gives both a and a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def edges(package: Path) -> dict[str, set[str]]:
    """For each dotted module of the package, the modules of the package that it imports."""
    files = {
        ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in package.rglob("*.py")
    }
    prefix = f"{package.name}."
    found = {
        name: {i.removeprefix(prefix) for i in imports(path) if i.startswith(prefix)} for name, path in files.items()
    }
    return {name: (names & files.keys()) - {name, ""} for name, names in found.items() if name}


def violations(package: Path) -> list[str]:
    graph = edges(package)
    texts = [f"{name} has no level in tests/test_imports.py" for name in graph if name.split(".")[0] not in LEVEL]
    if not texts:
        for name, targets in graph.items():
            level = LEVEL[name.split(".")[0]]
            texts += [f"{name} imports {target} above it" for target in targets if LEVEL[target.split(".")[0]] > level]
    done: set[str] = set()
    while ready := {name for name, targets in graph.items() if name not in done and targets <= done}:
        done |= ready
    return texts + ([f"a circle among {sorted(graph.keys() - done)}"] if graph.keys() - done else [])


def test_imports_point_down():
    assert violations(ROOT / "jaxgpt") == []


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"losses": "def f():\n    import jaxgpt.ppo", "ppo": ""}, "losses imports ppo above it"),
        ({"losses": "from jaxgpt import train", "train": ""}, "losses imports train above it"),
        (
            {"run": "import jaxgpt.cli", "cli": "def f():\n    from jaxgpt.run import Run"},
            "a circle among ['cli', 'run']",
        ),
        ({"data/a": "import jaxgpt.ppo", "ppo": ""}, "data.a imports ppo above it"),
        ({"newcomer": ""}, "newcomer has no level in tests/test_imports.py"),
        ({"ppo": "import jaxgpt.losses", "losses": "import jax"}, None),
    ],
)
def test_the_check_sees(tmp_path, files, complaint):
    package = tmp_path / "jaxgpt"
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(text)
    assert violations(package) == ([complaint] if complaint else [])


def test_the_package_imports_nothing():
    assert imports(ROOT / "jaxgpt" / "__init__.py") == []


@pytest.mark.parametrize("name", ARRAYS_ONLY)
def test_losses_take_arrays_only(name):
    package = ROOT / "jaxgpt" / name
    for path in package.glob("*.py") if package.is_dir() else [package.with_suffix(".py")]:
        for module in imports(path):
            top, *below = module.split(".")
            assert top in ARRAY_PACKAGES or (top == "jaxgpt" and (not below or below[0] in ARRAYS_ONLY)), (path, module)


def test_importing_the_losses_brings_in_nothing_else():
    """What the interpreter really loads: no flax, no tokenizer, no data library, none of our other modules."""
    program = f"import sys; import {', '.join(f'jaxgpt.{name}' for name in ARRAYS_ONLY)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(loaded.stdout.split())
    ours = {name.split(".")[1] for name in modules if name.startswith("jaxgpt.")}
    assert ours == set(ARRAYS_ONLY)
    assert not {"flax", "orbax", "grain", "tokenizers", "tensorflow_datasets", "tyro", "rich", "matplotlib"} & modules


def test_the_library_does_not_know_the_experiments():
    for path in (ROOT / "jaxgpt").rglob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] in ("experiments", "tpu", "tests")], path


def test_experiments_stand_alone():
    for path in (ROOT / "experiments").glob("*.py"):
        if path.stem not in ("assistant", "align", "bench_ppo"):  # two sequences; what it measures is one of them
            assert not [name for name in imports(path) if name.split(".")[0] == "experiments"], path


def test_every_experiment_is_a_command():
    """Its last statement hands `main` to the command line: without it `python -m` would do nothing, in silence."""
    paths = [path for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__"]
    assert len(paths) > 20
    for path in paths:
        last = ast.parse(path.read_text()).body[-1]
        assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'", path
