"""Rollouts saved for people to read: rollouts/NNNNNN.json in a PPO run, which the chat page shows token by token."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.data.templates import answer_text
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.files import read_record, write_record
from jaxgpt.rlhf.ppo import Targets
from jaxgpt.runs.run import results_to_json
from jaxgpt.structs import Array


def save_rollout(
    folder: Path, iteration: int, targets: Targets, logp_after_BT: Array, beta: float, tok: Tokenizer
) -> str:
    """Write the first answers of an iteration, as many as `logp_after_BT` has rows, and return the text of the first.

    Saved per token: its log-probability under the policy before the update and under the reference, value, return,
    advantage, and `ratio`: its probability after the update (`logp_after_BT`) divided by that before. A number that is
    not finite becomes null."""
    rollout, after_BT = jax.tree.map(np.asarray, (targets.rollout, logp_after_BT))
    arrays = {
        "logp": rollout.logp_BT,
        "ref_logp": rollout.ref_logp_BT,
        "value": rollout.value_BT,
        "return": np.asarray(targets.return_BT),
        "advantage": np.asarray(targets.advantage_BT),
    }
    with np.errstate(all="ignore"):
        arrays["ratio"] = np.exp(after_BT - rollout.logp_BT[: len(after_BT)])
    answers = []
    for b in range(len(after_BT)):
        positions = np.flatnonzero(rollout.mask_BT[b])
        answers.append(
            {
                "prompt": tok.show(rollout.tokens_BT[b, : positions[0]]),
                "tokens": tok.show_each(rollout.tokens_BT[b, positions]),
                "score": rollout.score_B[b],
                "ended": bool(rollout.ended_B[b]),
                **{name: x[b, positions] for name, x in arrays.items()},
            }
        )
    if jax.process_index() == 0:
        (folder / "rollouts").mkdir(exist_ok=True)
        path = folder / "rollouts" / f"{iteration:06d}.json"
        write_record(path, results_to_json({"iteration": iteration, "beta": beta, "answers": answers}))
    return answer_text(tok, rollout.tokens_BT[0, rollout.mask_BT[0]])


def load_rollout(path: Path) -> dict[str, Any]:
    """What `save_rollout` wrote. UserError if it is damaged."""
    names = ("iteration", "beta", "answers")
    return read_record(path, names, "choose another iteration", older=names)
