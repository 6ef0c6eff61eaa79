"""Direct preference optimisation (Rafailov et al. 2023) for any number of candidates.

    h(x, y) = beta log( pi(y|x) / rho(y|x) ),   J = -log( exp h(x, y^b) / sum_j exp h(x, y^j) )

y^b is the favourite. Parameters: trainable 'policy' and frozen 'reference'; or trainable adapters, where the policy's
frozen weights without them are the reference.
"""

import jax

from jaxgpt import losses
from jaxgpt.losses import Mean
from jaxgpt.models import lora
from jaxgpt.rlhf.policies import Policy
from jaxgpt.structs import Array, Params, Preferences
from jaxgpt.training.step import LossFn, Metrics


def make_loss(policy: Policy, beta: float | Array) -> LossFn[Preferences]:
    """The loss for C candidates, log C where pi = rho. `beta`: reward units per nat. With the policy's
    `new_tokens`, the tokens of the longest answer, logits are computed only for a window of that many."""

    def loss_fn(params: Params, batch: Preferences, key: Array | None = None) -> tuple[Mean, Metrics]:
        def answer_logp_BC(params: Params) -> Array:
            return policy.answer_logp(params, batch.rows).reshape(batch.present_BC.shape)

        ref_logp_BC = jax.lax.stop_gradient(answer_logp_BC(lora.reference_params(params)))
        h_BC = losses.implicit_reward(answer_logp_BC(params["policy"]), ref_logp_BC, beta)
        return losses.preference_objective(h_BC, batch.choice_B, batch.present_BC)

    return loss_fn
