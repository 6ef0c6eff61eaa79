"""The losses against TRL's own code on identical tensors, values and gradients. Skipped without TRL.

TRL's trainers are built from its flags, and their loss methods are called with a stand-in for the language model that
returns given log-probabilities: both gradients are taken with respect to these. Where TRL follows another convention,
the test's right-hand side shows which of our arguments make up for it.
"""

import os
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: models are random, the tokenizer is made here
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxgpt import losses
from jaxgpt.losses import Mean, combine, kl, reduce, returns, sequence_mean, sequence_sum, vocab_head

torch = pytest.importorskip("torch", reason="parity with TRL needs torch and trl: pip install torch 'trl>=1.16,<2'")
trl = pytest.importorskip("trl", minversion="1.16", reason="parity with TRL needs trl: pip install 'trl>=1.16,<2'")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning")

PROMPT, VOCAB = 3, 16
BETA = 0.3  # the KL coefficient wherever TRL's flag is called beta


# ---- TRL's side


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random GPT-2, from which TRL loads its reference model."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    language_model(folder).save_pretrained(folder)
    return folder


@pytest.fixture
def trainer(tiny, tmp_path):
    """A function that builds TRL's trainer NAME with these flags, around a random GPT-2 and dummy rows."""

    def build(name: str, **flags):
        torch.manual_seed(1)
        home = trl if hasattr(trl, name + "Trainer") else pytest.importorskip(f"trl.experimental.{name.lower()}")
        config = getattr(home, name + "Config")(
            output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to=[], **flags
        )
        rows = {"prompt": ["a b"] * 8, "chosen": ["c"] * 8, "rejected": ["d e"] * 8}
        if name == "KTO":
            rows = {"prompt": ["a b"] * 8, "completion": ["c"] * 8, "label": [True, False] * 4}
        kinds = {"Reward": transformers.GPT2ForSequenceClassification}
        made = getattr(home, name + "Trainer")(
            language_model(tiny, kinds.get(name, transformers.GPT2LMHeadModel)),
            args=config,
            train_dataset=datasets.Dataset.from_dict(rows),
            processing_class=words(),
            **({"reward_funcs": scores_of_the_rows} if name in ("GRPO", "RLOO") else {}),
            **({"ref_model": language_model(tiny)} if name in ("DPO", "KTO") else {}),
        )
        made.model.train()
        made.current_gradient_accumulation_steps = config.gradient_accumulation_steps  # Trainer.train sets it
        return made

    return build


def language_model(folder, kind=None):
    size = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
    config = transformers.GPT2Config(pad_token_id=0, eos_token_id=1, bos_token_id=1, num_labels=1, **size)
    made = (kind or transformers.GPT2LMHeadModel)(config)
    made.config._name_or_path = str(folder)
    return made


def words():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefghijklmn"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def scores_of_the_rows(completions, score, **_):
    return score


def leaf(x):
    return torch.tensor(np.asarray(x), requires_grad=True)


def model_that_gives(*logps, entropy=None):
    """A stand-in for a model with TRL's fused head: call i returns the i-th log-probabilities, 0 without a label."""
    from trl.trainer.utils import FusedCausalLMOutput

    queue = list(logps)

    def forward(*, labels, **_):
        real = labels[:, 1:] != -100
        logp = queue.pop(0)
        zeros = torch.zeros_like(logp)
        spread = zeros if entropy is None else entropy
        return FusedCausalLMOutput(
            log_probs=logp.masked_fill(~real, 0.0),
            entropy=spread.masked_fill(~real, 0.0),
            mean_logits=zeros.detach(),
            is_top1=zeros.bool(),
        )

    return forward


def agrees(trl_loss, trl_leaf, ours, x):
    """TRL's loss and its gradient for the leaf equal our function's value and gradient at x."""
    value, slope = jax.jit(jax.value_and_grad(ours))(jnp.asarray(x))
    trl_loss.backward()
    np.testing.assert_allclose(value, trl_loss.item(), rtol=1e-5)
    assert np.abs(slope).max() > 1e-4
    np.testing.assert_allclose(slope, trl_leaf.grad, rtol=1e-5, atol=1e-7)


# ---- pairs


def pairs(lengths=(4, 7, 1, 6, 2, 5), seed=0):
    """Rows of prompt and answer, the chosen ones first; log-probabilities of tokens 1, 2, ..., as both sides align."""
    rng, width = np.random.default_rng(seed), PROMPT + max(lengths)
    t, end = np.arange(width), PROMPT + np.array(lengths)[:, None]
    tokens = np.where(t < end, rng.integers(2, VOCAB, (len(lengths), width)), 0)
    logp = -rng.gamma(1.0, 1.0, (len(lengths), width - 1)).astype(np.float32)
    ref = (logp + 0.5 * rng.normal(size=logp.shape)).astype(np.float32)
    answer = (t >= PROMPT) & (t < end)
    return SimpleNamespace(tokens=tokens, row=t < end, answer=answer, mask=answer[:, 1:], logp=logp, ref=ref)


def as_trl(p, rows=slice(None)):
    whole = {"input_ids": p.tokens, "attention_mask": p.row, "completion_mask": p.answer}
    return {name: torch.tensor(x[rows].astype(np.int64)) for name, x in whole.items()}


def two_columns(x_B):
    """Chosen answers first, then the rejected ones, [2 N] -> [N, 2]: the favourite is candidate 0."""
    return x_B.reshape(2, -1).T


def first(x_NC):
    return jnp.zeros(len(x_NC), jnp.int32)


def unbiased(n):
    """Weights of the two labels that undo flips of probability 0.1 (Chowdhury et al. 2024): they sum to 1."""
    return jnp.tile(jnp.array([0.9, -0.1]) / 0.8, (n, 1))


DPO = {  # flags of TRL, and the loss of [N, 2] answers: log-probabilities summed (pi, rho) and as means (mpi, mrho)
    "sigmoid": ({}, lambda s: losses.dpo(s.pi, s.rho, first(s.pi), BETA)),
    "sigmoid_norm": ({}, lambda s: losses.dpo(s.mpi, s.mrho, first(s.pi), BETA)),
    # TRL averages over tokens, as the paper's authors did in their runs; its beta is the paper's tau.
    "ipo": ({}, lambda s: losses.ipo(*(s.mpi - s.mrho).T, tau=BETA)),
    "robust": (
        {"label_smoothing": 0.1},
        lambda s: losses.soft_preference_nll(losses.implicit_reward(s.pi, s.rho, BETA), unbiased(len(s.pi))),
    ),
    # KTO of both answers with its reference point fixed at 0.
    "apo_zero": (
        {},
        lambda s: losses.kto(s.pi - s.rho, jnp.tile(jnp.array([True, False]), (len(s.pi), 1)), 0.0, BETA).sum(axis=1),
    ),
}


@pytest.mark.parametrize("name", DPO)
def test_direct_alignment_losses_are_trls(trainer, name):
    flags, ours = DPO[name]
    p = pairs()
    made = trainer("DPO", loss_type=[name], beta=BETA, **flags)
    logp = leaf(p.logp)
    made.ref_model = model_that_gives(torch.tensor(p.ref))

    def loss(logp_BT):
        def columns(pool, x):
            return two_columns(pool(jnp.asarray(x), jnp.asarray(p.mask)))

        s = SimpleNamespace(
            pi=columns(sequence_sum, logp_BT),
            rho=columns(sequence_sum, p.ref),
            mpi=columns(sequence_mean, logp_BT),
            mrho=columns(sequence_mean, p.ref),
        )
        return reduce(ours(s)).value

    agrees(made.compute_loss(model_that_gives(logp), as_trl(p)), logp, loss, p.logp)


def test_conservative_dpo_is_trls_label_smoothing_of_a_single_pair(trainer):
    """TRL smooths labels in `aot_unpaired`, which sorts the batch's log-ratios first: one pair at a time it is cDPO.

    Its `sigmoid` loss takes no label smoothing; `robust` does, but divides by 1 - 2 eps.
    """
    p = pairs()
    made = trainer("DPO", loss_type=["aot_unpaired"], label_smoothing=0.2, beta=BETA)
    for i in range(3):
        rows = [i, i + 3]
        logp = leaf(p.logp[rows])
        made.ref_model = model_that_gives(torch.tensor(p.ref[rows]))
        mask, ref = jnp.asarray(p.mask[rows]), jnp.asarray(p.ref[rows])

        def loss(x, mask=mask, ref=ref):
            pi, rho = (two_columns(sequence_sum(y, mask)) for y in (x, ref))
            return reduce(losses.cdpo(pi, rho, first(pi), BETA, epsilon=0.2)).value

        agrees(made.compute_loss(model_that_gives(logp), as_trl(p, rows)), logp, loss, p.logp[rows])


def test_dpo_with_an_nll_term_adds_means_of_different_elements(trainer):
    """TRL's loss_type sigmoid + sft: a mean over pairs plus a weighted mean over the chosen answers' tokens."""
    p = pairs()
    made = trainer("DPO", loss_type=["sigmoid", "sft"], loss_weights=[0.8, 0.2], beta=BETA)
    logp = leaf(p.logp)
    made.ref_model = model_that_gives(torch.tensor(p.ref))

    def loss(x):
        pi, rho = (two_columns(sequence_sum(jnp.asarray(y), jnp.asarray(p.mask))) for y in (x, p.ref))
        pair = reduce(losses.dpo(pi, rho, first(pi), BETA)).value
        return 0.8 * pair + 0.2 * reduce(-x[:3], jnp.asarray(p.mask[:3])).value

    agrees(made.compute_loss(model_that_gives(logp), as_trl(p)), logp, loss, p.logp)


def test_dpo_metrics_are_trls(trainer):
    """Implicit rewards and their accuracy, as TRL logs them."""
    p = pairs()
    made = trainer("DPO", beta=BETA)
    made.ref_model = model_that_gives(torch.tensor(p.ref))
    made.compute_loss(model_that_gives(torch.tensor(p.logp)), as_trl(p))
    pi, rho = (two_columns(sequence_sum(jnp.asarray(x), jnp.asarray(p.mask))) for x in (p.logp, p.ref))
    reward = losses.implicit_reward(pi, rho, BETA)
    _, metrics = losses.preference_objective(reward, first(reward), jnp.ones(reward.shape, bool))
    logged = {name: values[0] for name, values in made._metrics["train"].items()}
    assert 0 < logged["rewards/accuracies"] < 1
    assert float(metrics["accuracy"].value) == pytest.approx(logged["rewards/accuracies"], rel=1e-5)
    assert float(reward[:, 0].mean()) == pytest.approx(logged["rewards/chosen"], rel=1e-5)
    assert float(reward[:, 1].mean()) == pytest.approx(logged["rewards/rejected"], rel=1e-5)


def test_dpo_from_a_models_logits_is_trls(trainer):
    """No stand-in here: TRL's forward passes, shift and masks, against log-probabilities of the same logits."""
    p = pairs()
    made = trainer("DPO", beta=BETA)
    found = made.compute_loss(made.model.eval(), as_trl(p)).item()

    def logp_of(model):
        with torch.no_grad():
            logits = model(torch.tensor(p.tokens), attention_mask=torch.tensor(p.row)).logits[:, :-1].numpy()
        return losses.log_prob(jnp.asarray(logits), jnp.asarray(p.tokens[:, 1:]))

    pi, rho = (two_columns(sequence_sum(logp_of(x), jnp.asarray(p.mask))) for x in (made.model, made.ref_model))
    assert float(reduce(losses.dpo(pi, rho, first(pi), BETA)).value) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize(("loss_type", "drift"), [("kto", 0.3), ("kto", -0.3), ("apo_zero_unpaired", 0.0)])
def test_kto_is_trls(trainer, loss_type, drift):
    """Weights, and the reference point from mismatched answers, never below 0; apo_zero_unpaired fixes it at 0."""
    p, other = pairs(), pairs(lengths=(3, 6, 5, 2, 7, 1), seed=1)
    other.logp = other.ref + np.float32(drift)
    made = trainer("KTO", loss_type=loss_type, beta=BETA, desirable_weight=1.2, undesirable_weight=0.7)
    labels = np.array([True, False, False, True, True, False])
    batch = {**as_trl(p), **{f"KL_{name}": x for name, x in as_trl(other).items()}, "label": torch.tensor(labels)}
    logp = leaf(p.logp)
    given = [torch.tensor(other.logp), logp], [torch.tensor(other.ref), torch.tensor(p.ref)]
    policy, made.ref_model = (model_that_gives(*(x if loss_type == "kto" else x[1:])) for x in given)

    def loss(x):
        log_ratio = sequence_sum(x - p.ref, jnp.asarray(p.mask))
        mismatched = sequence_sum(jnp.asarray(other.logp - other.ref), jnp.asarray(other.mask))
        reference = losses.kto_reference(mismatched) if loss_type == "kto" else 0.0
        return reduce(losses.kto(log_ratio, jnp.asarray(labels), reference, BETA, 1.2, 0.7)).value

    agrees(made.compute_loss(policy, batch), logp, loss, p.logp)
    assert made._metrics["train"]["kl"][0] == pytest.approx(4 * max(drift, 0.0), rel=1e-5)


def without_reference(p):
    """The batch that TRL's CPO and ORPO take, and logits in place of a model."""
    batch = {}
    for kind, rows in (("chosen", slice(0, 3)), ("rejected", slice(3, 6))):
        batch[f"{kind}_input_ids"] = torch.tensor(p.tokens[rows])
        batch[f"{kind}_attention_mask"] = torch.tensor(p.row[rows].astype(np.int64))
        batch[f"{kind}_labels"] = torch.tensor(np.where(p.answer, p.tokens, -100)[rows])
    logits = np.random.default_rng(2).normal(size=(*p.tokens.shape, VOCAB)).astype(np.float32)
    return batch, logits


def answers(logits, p, pool):
    logp_BT = losses.log_prob(logits[:, :-1], jnp.asarray(p.tokens[:, 1:]))
    return two_columns(pool(logp_BT, jnp.asarray(p.mask)))


CPO = {
    # TRL's simpo_gamma is the paper's gamma; the paper's own code has gamma / beta as its flag.
    "simpo": (
        {"simpo_gamma": 0.4},
        lambda logits, p: losses.simpo(*answers(logits, p, sequence_mean).T, beta=BETA, gamma=0.4),
    ),
    # CPO is DPO with a flat reference, and TRL smooths its labels as conservative DPO does.
    "sigmoid": (
        {"label_smoothing": 0.2},
        lambda logits, p: losses.cdpo(s := answers(logits, p, sequence_sum), 0.0 * s, first(s), BETA, epsilon=0.2),
    ),
}


@pytest.mark.parametrize("name", CPO)
def test_simpo_and_cpo_are_trls(trainer, name):
    flags, ours = CPO[name]
    p = pairs()
    batch, logits = without_reference(p)
    made = trainer("CPO", loss_type=name, beta=BETA, cpo_alpha=0.0, **flags)
    given = leaf(logits)
    found, _ = made.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=given), batch)
    agrees(found, given, lambda x: reduce(ours(x, p)).value, logits)


def test_orpo_is_trls_up_to_the_tokens_of_its_nll(trainer):
    """The odds ratio is the same. TRL's NLL includes the prompt's tokens, and weights tokens equally, not answers."""
    p = pairs()
    batch, logits = without_reference(p)
    made = trainer("ORPO", beta=BETA)
    given = leaf(logits)
    found, _ = made.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=given), batch)
    prompt_too = jnp.asarray(p.row[:3, 1:])

    def loss(x):
        chosen, rejected = answers(x, p, sequence_mean).T
        odds = losses.orpo(chosen, rejected, weight=BETA) + chosen  # orpo's own NLL is -chosen
        return reduce(odds).value + reduce(losses.nll(x[:3, :-1], jnp.asarray(p.tokens[:3, 1:])), prompt_too).value

    agrees(found, given, loss, logits)


# ---- reward model


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centering", [None, 0.01])
def test_the_reward_models_loss_is_trls(trainer, margin, centering):
    """Pairs, with a margin and with the reward-centring term; and the accuracy TRL logs."""
    scores = np.random.default_rng(0).normal(1.0, 2.0, (12, 1)).astype(np.float32)
    margin_B = np.array([0.5, 1.0, 0.0, 2.0, 0.1, 0.3], np.float32)
    made = trainer("Reward", center_rewards_coefficient=centering)
    given = leaf(scores)
    inputs = {"attention_mask": torch.ones(12, 1)} | ({"margin": torch.tensor(margin_B)} if margin else {})
    found = made.compute_loss(lambda **_: SimpleNamespace(logits=given), inputs)

    def loss(x):
        s = two_columns(x[:, 0])
        terms = {
            "nll": losses.preference_nll(s, first(s), margin_B=jnp.asarray(margin_B) if margin else 0.0),
            "centering": losses.reward_centering(s),
        }
        return combine(terms, weights={"centering": centering or 0.0})[0].value

    agrees(found, given, loss, scores)
    s = two_columns(jnp.asarray(scores[:, 0]))
    _, metrics = losses.preference_objective(s, first(s), jnp.ones(s.shape, bool))
    assert float(metrics["accuracy"].value) == pytest.approx(made._metrics["train"]["accuracy"][0])


# ---- policy gradients

GROUP, LONGEST = 4, 6


def rollout(lengths=(6, 1, 4, 3, 5, 2, 6, 4), seed=0):
    """Answers to two prompts, with log-probabilities of the policy, the sampling policy and the reference policy."""
    rng, shape = np.random.default_rng(seed), (len(lengths), LONGEST)
    logp = -rng.gamma(1.0, 1.0, shape)
    old, ref = logp + 0.4 * rng.normal(size=shape), logp + 0.5 * rng.normal(size=shape)
    arrays = {"logp": logp, "old": old, "ref": ref, "advantage": rng.normal(size=len(lengths))}
    mask = np.arange(LONGEST) < np.array(lengths)[:, None]
    spread = rng.uniform(0.1, 2.0, shape).astype(np.float32)
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    return SimpleNamespace(mask=mask, entropy=spread, **arrays)


def trl_loss(made, r, logp, rows=slice(None), items=None):
    """The GRPO or RLOO trainer's loss of these rows; `logp` is the leaf of all of them."""
    B = len(r.mask[rows])
    inputs = {
        "prompt_ids": torch.full((B, PROMPT), 2),
        "prompt_mask": torch.ones(B, PROMPT, dtype=torch.int64),
        "completion_ids": torch.full((B, LONGEST), 3),
        "completion_mask": torch.tensor(r.mask[rows].astype(np.int64)),
        "old_per_token_logps": torch.tensor(r.old[rows]),
        "ref_per_token_logps": torch.tensor(r.ref[rows]),
        "old_logps": torch.tensor(np.where(r.mask, r.old, 0).sum(1)[rows]),
        "advantages": torch.tensor(r.advantage[rows]),
        "num_items_in_batch": torch.tensor(r.mask.sum() if items is None else items),
    }

    def with_prompt(x):
        return torch.cat([torch.zeros(B, PROMPT - 1), x], dim=1)

    model = model_that_gives(with_prompt(logp[rows]), entropy=with_prompt(torch.tensor(r.entropy[rows])))
    return made.compute_loss(model, inputs)


def on_tokens(r):
    """One advantage an answer, on its tokens."""
    return jnp.broadcast_to(jnp.asarray(r.advantage)[:, None], r.mask.shape)


def clipped(x, r, clip=0.2, clip_high=None):
    return losses.ppo_clip(losses.log_ratio(x, jnp.asarray(r.old)), on_tokens(r), clip, clip_high)


def gspo(x, r, clip):
    s_B = losses.sequence_log_ratio(x, jnp.asarray(r.old), jnp.asarray(r.mask))
    return losses.ppo_clip(s_B, jnp.asarray(r.advantage), clip)


def priced(x, r):
    """k3 to the reference as a loss, with the weight that TRL calls beta."""
    return BETA * kl.k3(x, jnp.asarray(r.ref))


def ratio(x, r):
    return jnp.exp(losses.log_ratio(x, jnp.asarray(r.old)))


def a_token(values, r):
    return reduce(values, jnp.asarray(r.mask)).value


def an_answer(values, r):
    return reduce(sequence_mean(values, jnp.asarray(r.mask))).value


def a_length(values, r):
    return reduce(sequence_sum(values, jnp.asarray(r.mask)) / LONGEST).value


def capped(x, r):
    """The ratio capped at an absolute value (not at 1 + a margin), as a weight without gradient."""
    return on_tokens(r) * jnp.minimum(ratio(x, r), 1.2)


def spread_out(values_B, r):
    return jnp.broadcast_to(values_B[:, None], r.mask.shape)


def dual(x, r):
    return losses.dual_clip(losses.log_ratio(x, jnp.asarray(r.old)), on_tokens(r), 0.2, 0.28, limit=1.4)


SEQUENCE = {"importance_sampling_level": "sequence"}
PLAIN_KL = {"beta": BETA, "use_bias_correction_kl": False}
GRPO = {  # flags of TRL, and the loss of log-probabilities x and rollout r
    "answers alike": ({"loss_type": "grpo"}, lambda x, r: an_answer(clipped(x, r), r)),
    "tokens alike, this batch's": ({"loss_type": "bnpo"}, lambda x, r: a_token(clipped(x, r), r)),
    "tokens alike, all": ({"loss_type": "dapo"}, lambda x, r: a_token(clipped(x, r), r)),
    "a constant length": ({"loss_type": "dr_grpo"}, lambda x, r: a_length(clipped(x, r), r)),
    "summed": ({"loss_type": "luspo"}, lambda x, r: LONGEST * a_length(clipped(x, r), r)),
    "clip-higher": ({"epsilon_high": 0.28}, lambda x, r: a_token(clipped(x, r, 0.2, 0.28), r)),
    "two-sided clipping": ({"epsilon_high": 0.28, "delta": 1.4}, lambda x, r: a_token(dual(x, r), r)),
    "KL as a loss": (PLAIN_KL, lambda x, r: a_token(clipped(x, r) + priced(x, r), r)),
    "KL as a loss, answers alike": (
        {**PLAIN_KL, "loss_type": "grpo"},
        lambda x, r: an_answer(clipped(x, r) + priced(x, r), r),
    ),
    # TRL's default: k3 weighted by the ratio, whose gradient is that of KL(pi || rho).
    "KL weighed by the ratio": (
        {"beta": BETA},
        lambda x, r: a_token(clipped(x, r) + priced(x, r) * ratio(x, r), r),
    ),
    "entropy bonus": (
        {"entropy_coef": 0.01},
        lambda x, r: (
            combine(
                {"policy": clipped(x, r), "entropy": -jnp.asarray(r.entropy)}, jnp.asarray(r.mask), {"entropy": 0.01}
            )[0].value
        ),
    ),
    "GSPO": ({**SEQUENCE, "loss_type": "grpo", "epsilon": 0.1}, lambda x, r: reduce(gspo(x, r, 0.1)).value),
    # TRL's default loss_type with it: an answer is weighted by its number of tokens.
    "GSPO, tokens alike": (
        {**SEQUENCE, "epsilon": 0.1},
        lambda x, r: a_token(spread_out(gspo(x, r, 0.1), r), r),
    ),
    "GSPO with KL": (
        {**SEQUENCE, **PLAIN_KL, "loss_type": "grpo"},
        lambda x, r: reduce(gspo(x, r, 0.2)).value + an_answer(priced(x, r), r),
    ),
    "CISPO": (
        {"loss_type": "cispo", "epsilon_high": 1.2},
        lambda x, r: a_token(losses.reinforce(x, capped(x, r)), r),
    ),
}


@pytest.mark.parametrize("name", GRPO)
def test_grpo_losses_are_trls(trainer, name):
    flags, ours = GRPO[name]
    r = rollout()
    made = trainer("GRPO", num_generations=GROUP, max_completion_length=LONGEST, steps_per_generation=1, **flags)
    logp = leaf(r.logp)
    agrees(trl_loss(made, r, logp), logp, lambda x: ours(x, r), r.logp)


def test_parts_of_a_batch_pool_as_trl_accumulates_them(trainer):
    """dapo divides by the whole batch's tokens: our sums and counts add up to it, bnpo's mean of means doesn't."""
    r = rollout()
    halves = slice(0, 4), slice(4, 8)
    found = {}
    for loss_type in ("dapo", "bnpo"):
        flags = {"steps_per_generation": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
        made = trainer("GRPO", num_generations=GROUP, max_completion_length=LONGEST, loss_type=loss_type, **flags)
        found[loss_type] = sum(trl_loss(made, r, torch.tensor(r.logp), half).item() for half in halves)
    values, mask = clipped(jnp.asarray(r.logp), r), jnp.asarray(r.mask)
    first_half, second_half = (reduce(values[half], mask[half]) for half in halves)
    pooled: Mean = first_half + second_half
    assert float(pooled.value) == pytest.approx(found["dapo"], rel=1e-5)
    assert float(first_half.value + second_half.value) / 2 == pytest.approx(found["bnpo"], rel=1e-5)
    assert found["bnpo"] != pytest.approx(found["dapo"], rel=1e-3)


def test_an_answer_without_tokens_still_counts_in_trls_mean_over_answers(trainer):
    """TRL masks out truncated answers but divides by all rows; a mask of rows leaves them out of our count."""
    r = rollout(lengths=(6, 1, 4, 3, 0, 2, 6, 4))
    made = trainer("GRPO", num_generations=GROUP, max_completion_length=LONGEST, loss_type="grpo")
    found = trl_loss(made, r, torch.tensor(r.logp)).item()
    values_B = sequence_mean(clipped(jnp.asarray(r.logp), r), jnp.asarray(r.mask))
    assert float(reduce(values_B).value) == pytest.approx(found, rel=1e-5)
    assert float(reduce(values_B, jnp.asarray(r.mask.any(1))).value) == pytest.approx(found * 8 / 7, rel=1e-5)


def test_the_clip_fraction_counts_where_the_clip_holds(trainer):
    r = rollout()
    made = trainer("GRPO", num_generations=GROUP, max_completion_length=LONGEST, epsilon=0.2, epsilon_high=0.28)
    trl_loss(made, r, torch.tensor(r.logp))
    x, mask = losses.log_ratio(jnp.asarray(r.logp), jnp.asarray(r.old)), jnp.asarray(r.mask)
    advantage = returns.broadcast_to_tokens(jnp.asarray(r.advantage, jnp.float32), mask)
    found = losses.ratio_metrics(x, advantage, mask, 0.2, 0.28)["clip_fraction"].value
    assert 0 < float(found) == pytest.approx(made._metrics["train"]["clip_ratio/region_mean"][0], rel=1e-5)


@pytest.mark.parametrize("clip_high", [0.2, 0.28])
def test_rloo_is_trls(trainer, clip_high):
    """TRL's ratio is the whole answer's: the sum of its tokens' log-ratios, not the mean as in GSPO."""
    r = rollout()
    made = trainer("RLOO", num_generations=GROUP, max_completion_length=LONGEST, epsilon_high=clip_high)
    logp = leaf(r.logp)

    def loss(x):
        new, old = (sequence_sum(y, jnp.asarray(r.mask)) for y in (x, jnp.asarray(r.old)))
        return reduce(losses.ppo_clip(losses.log_ratio(new, old), jnp.asarray(r.advantage), 0.2, clip_high)).value

    agrees(trl_loss(made, r, logp), logp, loss, r.logp)


SCORES = np.array([0.3, -1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0], np.float32)  # of two prompts; the second's are all equal


def scored(made, scores=SCORES):
    """What TRL computes from sampled answers with these scores."""
    made.model.eval()
    rows = [{"prompt": "a b c", "score": float(s)} for s in scores]
    made.args.per_device_eval_batch_size, made.num_generations_eval = len(scores), GROUP
    return made._generate_and_score_completions(rows)


def two_groups(x):
    return jnp.asarray(x).reshape(-1, GROUP)


ADVANTAGES = {
    "group": lambda h: returns.grpo(h),  # the sample deviation and 1e-4, both
    "none": lambda h: returns.centre_scores(h),
    "batch": lambda h: returns.centre_scores(h) / (np.std(SCORES, ddof=1) + 1e-4),
}


@pytest.mark.parametrize("scale_rewards", ADVANTAGES)
def test_grpo_advantages_are_trls(trainer, scale_rewards):
    made = trainer("GRPO", num_generations=GROUP, max_completion_length=LONGEST, scale_rewards=scale_rewards)
    found = scored(made)["advantages"].numpy()
    expected = ADVANTAGES[scale_rewards](two_groups(SCORES)).reshape(-1)
    np.testing.assert_allclose(expected, found, rtol=1e-5, atol=1e-6)
    assert np.abs(found).max() > 0.5


@pytest.mark.parametrize("normalize", [False, True])
def test_rloo_advantages_are_trls(trainer, normalize):
    """k1 summed over the answer is subtracted from its score. TRL normalises by the sample deviation plus 1e-4."""
    made = trainer(
        "RLOO", num_generations=GROUP, max_completion_length=LONGEST, beta=BETA, normalize_advantages=normalize
    )
    out = scored(made)
    rows = torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1)
    real = torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1)
    with torch.no_grad():
        logp, ref = (
            jnp.asarray(made._get_per_token_logps_and_entropies(x, rows, real, LONGEST)[0].numpy())
            for x in (made.model, made.ref_model)
        )
    paid = BETA * kl.sequence_kl(logp, ref, jnp.asarray(out["completion_mask"].numpy() > 0))
    assert float(jnp.abs(paid).max()) > 0.05
    expected = returns.rloo(two_groups(SCORES - paid)).reshape(-1)
    if normalize:
        n, spread = len(SCORES), np.std(expected, ddof=1)
        expected = returns.whiten(expected, jnp.ones(n, bool)) * np.sqrt((n - 1) / n) * spread / (spread + 1e-4)
    np.testing.assert_allclose(expected, out["advantages"], rtol=1e-4, atol=1e-5)


# ---- the head


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_tiled_head_is_trls(temperature):
    """Log-probability, entropy and mean logit of hidden states, with gradients for the states and the weights."""
    from trl.kernels import ChunkedLogProbFunction

    rng = np.random.default_rng(0)
    hidden, head = (rng.normal(size=shape).astype(np.float32) for shape in ((10, 8), (40, 8)))
    tokens = rng.integers(0, 40, 10)
    weigh = rng.normal(size=(2, 10)).astype(np.float32)
    h, w = leaf(hidden), leaf(head)
    logp, entropy, _, mean_logit, _ = ChunkedLogProbFunction.apply(
        h, w, None, torch.tensor(tokens), temperature, 4, None, 1.0, ("entropy", "mean_logits")
    )
    (torch.tensor(weigh) * torch.stack([logp, entropy])).sum().backward()

    def loss(hidden, head):
        out = vocab_head.tiled_head_outputs(hidden, head, jnp.asarray(tokens), tile=4, temperature=temperature)
        return (weigh * jnp.stack([out.logp, out.entropy])).sum(), out

    slopes, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)
    np.testing.assert_allclose(out.logp, logp.detach(), rtol=1e-5)
    np.testing.assert_allclose(out.entropy, entropy.detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.mean_logp + out.log_z, mean_logit.detach(), rtol=1e-4, atol=1e-5)
    for slope, expected in zip(slopes, (h.grad, w.grad), strict=True):
        np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-5)
