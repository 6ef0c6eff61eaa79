"""Rollouts kept for people to read: rollouts/NNNNNN.json of a PPO run, which the chat page shows token by token."""

from pathlib import Path

import jax
import numpy as np

from jaxgpt.data.tokenizer import Tokenizer, answer_text
from jaxgpt.files import write_json
from jaxgpt.rlhf.ppo import Targets
from jaxgpt.structs import Array


def keep_rollout(
    folder: Path, iteration: int, targets: Targets, logp_after_BT: Array, beta: float, tok: Tokenizer
) -> str:
    """Write the first answers of an iteration, as many as `logp_after_BT` has rows, and return the first one's text.

    Per token: log-probabilities before the update and the reference's, value, return, advantage, and `ratio`, that of
    the policy after the update (`logp_after_BT`) to the one before."""
    old, after_BT = jax.tree.map(np.asarray, (targets.rollout, logp_after_BT))
    arrays = {
        "logp": old.logp_BT,
        "ref_logp": old.ref_logp_BT,
        "value": old.value_BT,
        "return": np.asarray(targets.return_BT),
        "advantage": np.asarray(targets.advantage_BT),
        "ratio": np.exp(after_BT - old.logp_BT[: len(after_BT)]),
    }
    answers = []
    for b in range(len(after_BT)):
        places = np.flatnonzero(old.mask_BT[b])
        answers.append(
            {
                "prompt": tok.show(old.tokens_BT[b, : places[0]]),
                "tokens": [tok.show([t]) for t in old.tokens_BT[b, places]],
                "score": float(old.score_B[b]),
                "ended": bool(old.ended_B[b]),
                **{name: x[b, places].tolist() for name, x in arrays.items()},
            }
        )
    if jax.process_index() == 0:
        (folder / "rollouts").mkdir(exist_ok=True)
        path = folder / "rollouts" / f"{iteration:06d}.json"
        write_json(path, {"iteration": iteration, "beta": beta, "answers": answers})
    return answer_text(tok, old.tokens_BT[0, old.mask_BT[0]])
