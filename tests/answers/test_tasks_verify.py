"""The answer checker: exact, and not to be talked into a point."""

import sys

import pytest

from gspo_jax.answers.verify import MAX_TEXT, accuracy, boxed, check, check_list


@pytest.mark.parametrize(
    "text, content",
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed { 7 }", "7"),
        (r"\boxed{a \} b}", r"a \} b"),  # an escaped brace closes nothing
        (r"\boxed{3} and \boxed{4", "3"),  # the last one that is balanced
        (r"\boxed{\boxed{5}}", "5"),
        (r"Put it in \boxed{}: \boxed{6}. Not \boxed{ }.", "6"),
        (r"\boxed{}", ""),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"reasoning \boxed{1}</think> no box here", None),
        (r"<think> unfinished \boxed{1}", None),
        (r"<think>a</think>\boxed{1}<think>again", None),
        ("42", None),
        (r"\boxed 42", None),
        (r"\fbox{42}", None),
        ("", None),
    ],
)
def test_boxed_finds_the_last_balanced_box_after_the_reasoning(text, content):
    assert boxed(text) == content


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("54", "54"),
        ("54.", "54"),
        ("12", "12.0"),
        ("033", "33"),
        ("+7", "7"),
        ("-0", "0"),
        ("1,234,567", "1234567"),
        (".5", "1/2"),
        (r"\frac{3}{4}", "0.75"),
        (r"-\dfrac{6}{8}", "-3/4"),
        (r"\frac{-3}{4}", "-3/4"),
        (r"-\frac{-3}{4}", "0.75"),
        (r"\frac34", "3/4"),
        (r"\dfrac 3{4}", r"\frac{3}{4}"),
        (r"x=\frac43", "4/3"),
        ("1{,}234", "1234"),
        ("\u22125", "-5"),
        (r"\$18", "18"),
        ("$18$", "18"),
        (r"50\%", "50"),
        (r"12\text{ cm}", "12"),
        (r"90^\circ", "90"),
        (r"x = 5", "5"),
        (r"1\,000", "1000"),
        ("9" * 60, int("9" * 60)),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\left( 3, 5 \right)", "(3,5)"),
        (r"\dfrac{\pi}{2}", r"\frac{\pi}{2}"),
    ],
)
def test_equal_answers_score_1(answer, gold):
    assert check(rf"so \boxed{{{answer}}}", gold) == (1.0, answer, "correct")


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("5", "15"),
        ("15", "5"),
        ("-6", "6"),
        ("x^2-6x", "-6"),
        ("x-6", "-6"),
        ("2-6", "-6"),
        ("-6x", "-6"),
        (r"\frac{x}{-6}", "-6"),
        (r"\frac123", "1/23"),
        (r"\frac{1}{-2}", "1/2"),
        ("0.3333", "1/3"),
        ("0.30000000000000004", "0.3"),  # equal as floating point numbers
        ("10000000000000001", "10000000000000000"),
        ("12,34", "1234"),
        ("1/0", "1"),
        ("1e2", "100"),
        ("5 or 6", "5"),
        ("5, 6", "5"),
        ("5 5", "55x"),
        ("nan", "5"),
        ("inf", "5"),
        ("NaN", "0"),
        ("answer", "5"),
        ("?", "5"),
        ("٥", "5"),  # a digit in another script is not written as asked
        ("5_0", "50"),
        ("__import__('os').abort()", "5"),
        ("2+3", "5"),
        ("evelyn", "Evelyn"),
        (r"\leftarrow", "arrow"),
    ],
)
def test_different_answers_score_0(answer, gold):
    assert check(rf"\boxed{{{answer}}}", gold)[::2] == (0.0, "wrong")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no answer"),
        ("the answer is 54", "no answer"),
        ("54", "no answer"),
        ("What is 47+25-18? 54", "no answer"),
        ("#### 54", "no answer"),
        ("<answer>54</answer>", "no answer"),
        (r"\boxed{54", "no answer"),
        (r"<think>\boxed{54}", "no answer"),
        (r"\boxed{}", "blank"),
        (r"\boxed{ }", "blank"),
        (r"\boxed{53} \boxed{54}", "ambiguous"),
        (r"\boxed{54} \boxed{53}", "ambiguous"),
        (" ".join(rf"\boxed{{{n}}}" for n in range(100)), "ambiguous"),
        (r"\boxed{" + "0" * 500 + "54}", "too long"),
        (r"\boxed{53}", "wrong"),
    ],
)
def test_what_is_not_one_boxed_answer_scores_0(text, reason):
    verdict = check(text, "54")
    assert (verdict.score, verdict.reason) == (0.0, reason)


def test_a_repeated_answer_may_be_spelled_differently():
    assert check(r"\boxed{\frac{1}{2}}, that is \boxed{0.5}", "1/2").score == 1.0


def test_a_blank_gold_answer_is_never_matched():
    assert check(r"\boxed{}", "").score == 0.0
    assert check(r"\boxed{5}", " ").score == 0.0
    assert check(r"\boxed{$$}", "").score == 0.0


HOSTILE = [
    "A" * 1_000_000,
    r"\boxed{" * 5000,
    r"\boxed{" * 5000 + "}" * 5000,
    "{" * 1_000_000,
    "}" * 1_000_000,
    "\\" * 1_000_001,
    r"\boxed" + " " * 1_000_000,
    (r"\boxed" + " " * 999) * 1000,
    r"\boxed{" + "9" * 1_000_000 + "}",
    r"\boxed{" + "," * 399 + "}",
    r"\boxed{" + "1,000" * 79 + "x}",
    r"\boxed{" + r"\text{" * 60 + "}" * 60 + "}",
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{(10^8)!}",
    r"\boxed{1e999999999}",
    r"\boxed{" + "{" * 190 + "}" * 190 + "}",
    "<think>" * 100_000,
    "</think>" * 100_000,
    r"\boxed{5}" * 100_000 + r"\boxed{6}",
    "\x00\x1b[2J" * 1000,
]


@pytest.mark.parametrize("compare", [check, check_list])
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_scores_0_with_work_linear_in_its_length(text, compare):
    """Work is counted in executed lines, not seconds, so that a busy machine cannot fail it."""
    lines = 0

    def count(frame, event, _):
        nonlocal lines
        lines += event == "line"
        return count

    compare(text[:2_000_000], "5")  # now its regular expressions are compiled
    sys.settrace(count)
    try:
        verdict = compare(text[:2_000_000], "5")
    finally:
        sys.settrace(None)
    assert verdict.score == 0.0
    # Ten lines for each brace that is read, at most; a quadratic scan of 5000 boxes needs 25 M.
    assert lines < 20 * min(len(text), MAX_TEXT) + 4000


def test_nothing_in_an_answer_is_executed(tmp_path):
    canary = tmp_path / "canary"
    for code in (f"__import__('pathlib').Path({str(canary)!r}).touch()", f"open({canary!r},'w')"):
        check(rf"\boxed{{{code}}}", code.replace("touch", "exists"))
        check(rf"\boxed{{{code}}}", "5")
    assert not canary.exists()


def test_accuracy_takes_texts_chats_and_missing_gold_answers():
    chat = [{"role": "user", "content": "What is 1+1?"}]
    scores = accuracy(
        prompts=["a", chat, "c", "d"],
        completions=[r"\boxed{1}", [{"role": "assistant", "content": r"\boxed{2}"}], "x", "y"],
        answer=["1", "2", None, "3"],
        completion_ids=[[1], [2], [3], [4]],
    )
    assert scores == [1.0, 1.0, None, 0.0]


def test_accuracy_gives_nothing_for_repeating_a_prompt_that_shows_a_box():
    prompt = r"Is the answer \boxed{5} or \boxed{5.0}?"
    assert accuracy([prompt], [prompt], ["5"]) == [0.0]
    assert accuracy([prompt], [prompt + r" \boxed{5}"], ["5"]) == [1.0]


def test_accuracy_refuses_columns_of_different_lengths():
    with pytest.raises(ValueError):
        accuracy(["a", "b"], ["c"], ["d"])


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("12 cm", "12"),
        ("12", r"12\text{ cm}"),
        (r"12\text{ cm}", "12 cm"),
        (r"12\,\text{cm}", "12 centimeters"),
        ("120 cm", "1.2 m"),
        (r"\frac{1}{2}\text{ hour}", "30 minutes"),
        ("1,500 grams", r"1.5\text{ kg}"),
        (r"100\text{ cm}^2", "0.01 m^2"),
        ("4 square feet", r"4 \text{ ft}^{2}"),
        (r"\$18", "18 dollars"),
        ("50 cents", r"\$0.50"),
        ("3 feet.", "1 yard"),
        ("90 degrees", "90"),
        (r"90^\circ", "90 degrees"),
        ("50 percent", r"50\%"),
        (r"18\text{ apples}", "18"),
        ("$12$ cm", "12 cm"),
    ],
)
def test_units_that_say_the_same_score_1(answer, gold):
    assert check(rf"\boxed{{{answer}}}", gold).score == 1.0


@pytest.mark.parametrize(
    "answer, gold",
    [
        (r"12\text{ m}", r"12\text{ cm}"),
        ("12 m", "12 cm"),
        ("12 cm", "12 seconds"),
        ("12 cm", "12 cm^2"),
        ("12 cm^2", "12 cm^3"),
        ("120 cm", "1.2"),
        ("50 cents", "50 dollars"),
        ("1 mile", "1.6 km"),  # 1.609344 km
        ("3h", "3"),  # may be algebra: 3 times h
        ("5m", "5"),
        ("12 apples", "12"),  # an unknown word is no unit
        ("12 or more", "12"),
        ("12 to 13 cm", "12"),
        ("12 cm, 13 cm", "12 cm"),
        ("cm", "12 cm"),
        ("12 kg^2", "12 kg"),
    ],
)
def test_units_that_say_something_else_score_0(answer, gold):
    assert check(rf"\boxed{{{answer}}}", gold).score == 0.0


def test_the_same_length_boxed_twice_is_one_answer():
    assert check(r"\boxed{120\text{ cm}} = \boxed{1.2\text{ m}}", "1.2 m").score == 1.0
    assert check(r"\boxed{120\text{ cm}} = \boxed{12\text{ m}}", "12 m").reason == "ambiguous"


def test_lists_are_compared_item_by_item():
    for text in ("red, Blue", "red,blue", "red and blue", r"\text{Red, blue}", "red , and blue."):
        assert check_list(rf"\boxed{{{text}}}", "red, blue").score == 1.0, text
    for text in ("blue, red", "red", "red, blue, green", "red blue", "red or blue", "redblue", ""):
        assert check_list(rf"\boxed{{{text}}}", "red, blue").score == 0.0, text
    assert check_list(r"\boxed{red, blue} \boxed{Red and blue}", "red, blue").score == 1.0
    assert check_list(r"\boxed{blue, red} \boxed{red, blue}", "red, blue").reason == "ambiguous"
    assert check_list(r"\boxed{12.0}", "12").score == 1.0
    assert check_list("red, blue", "red, blue").reason == "no answer"
