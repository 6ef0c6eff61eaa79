"""The judge learns what its labels say."""

from jaxgpt.rlhf.judge import fit_judge


def test_the_judge_learns_from_labels():
    good, bad = (
        ["a great warm film", "warm and great fun", "great fun"],
        ["a dull cold mess", "dull and cold", "a mess"],
    )
    judge = fit_judge((good + bad, [1, 1, 1, 0, 0, 0]), (["great", "dull"], [1, 0]))
    assert judge.accuracy.mean == 1.0 and str(judge).startswith("100.0% of 2 (95 % interval 34.2% to 100.0%: too few")
    assert judge.positive_probability(["great fun"])[0] > 0.5 > judge.positive_probability(["a dull mess"])[0]
