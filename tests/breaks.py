"""Check the checks: break the library in twelve places, one at a time, and see a quick test fail each time.

    python -m tests.breaks              # all of them, in a copy of the checkout
    python -m tests.breaks causality    # one

A break is one line of one module. It runs the quick tests of the files that should notice, and ends with status 1 if
any break went unnoticed. Add a line here when you add a property whose loss would be silent.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Break(NamedTuple):
    """`old`, which stands once in `module`, becomes `new`; quick tests of `tests` must fail."""

    module: str
    old: str
    new: str
    tests: str


BREAKS = {
    "causality": Break(
        "models/cpu_layers", "jnp.tril(jnp.ones((T, T), bool))", "jnp.tril(jnp.ones((T, T), bool), 1)", "transformer"
    ),
    "mask count": Break(
        "losses/mean", "mask.sum().astype(values.dtype)", "jnp.asarray(mask.size, values.dtype)", "losses proofs"
    ),
    "KL sign": Break("losses/kl", "    return logp - ref_logp\n", "    return ref_logp - logp\n", "kl proofs"),
    "GAE lambda": Break("losses/returns", "gamma * lam * advantage_B", "gamma * advantage_B", "returns proofs"),
    "position": Break(
        "decoding/generate", "position_B = length_B + t\n", "position_B = length_B + t + 1\n", "generate"
    ),
    "temperature": Break("losses/vocab_head", "    logits = logits / temperature\n", "", "vocab_head proofs"),
    "resume position": Break("data/pipelines", "self._iterator.set_state(state", "dict(state", "pipelines checkpoints"),
    "guard": Break("training/guard", "jnp.isfinite(loss) & jnp.isfinite(grad_norm)", "jnp.isfinite(loss)", "guard"),
    "template escape": Break("data/tokenizer", "_core.encode(text,", "_core.encode(self.mark(text),", "tokenizer"),
    "vote order": Break("data/votes", "json.dumps(vote.tiers)", "json.dumps(vote.tiers[::-1])", "votes"),
    "sharding spec": Break("models/transformer", '"up/kernel": P(*COLUMN_PARALLEL)', '"up/kernel": P()', "sharding"),
    "sampler filter": Break("decoding/sampling", "keepdims=True) >= p\n", "keepdims=True) > 0\n", "sampling"),
}


def unnoticed(name: str, checkout: Path) -> bool:
    """Whether the quick tests pass in this checkout although the library is broken."""
    one = BREAKS[name]
    path = checkout / "jaxgpt" / f"{one.module}.py"
    whole = path.read_text(encoding="utf-8")
    if whole.count(one.old) != 1:
        sys.exit(f"{name}: {one.old!r} stands {whole.count(one.old)} times in {path.name}; it must stand once")
    path.write_text(whole.replace(one.old, one.new), encoding="utf-8")
    files = [str(path) for test in one.tests.split() for path in (checkout / "tests").rglob(f"test_{test}.py")]
    start = time.monotonic()
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *files]
    done = subprocess.run(words, cwd=checkout, capture_output=True, text=True)
    path.write_text(whole, encoding="utf-8")
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if done.returncode > 1 or bool(failed) != bool(done.returncode):
        sys.exit(f"{name}: the tests did not run\n{done.stdout}{done.stderr}")
    print(f"{name:16} {time.monotonic() - start:5.1f} s  {failed[0] if failed else 'NOTHING FAILED'}", flush=True)
    return not failed


def main(names: list[str]) -> int:
    if strangers := set(names) - set(BREAKS):
        sys.exit(f"no break called {', '.join(sorted(strangers))}; there are {', '.join(BREAKS)}")
    with tempfile.TemporaryDirectory() as scratch:
        checkout = Path(scratch) / "jaxgpt"
        ignored = shutil.ignore_patterns(".git", ".venv*", "runs", ".pytest_cache", "__pycache__")
        shutil.copytree(ROOT, checkout, ignore=ignored)
        missed = [name for name in names or BREAKS if unnoticed(name, checkout)]
    print(f"{len(names or BREAKS) - len(missed)} of {len(names or BREAKS)} breaks were noticed")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
