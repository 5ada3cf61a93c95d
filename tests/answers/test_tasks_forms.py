"""The forms in which models write a right answer, and the wrong answers in the same forms."""

import importlib.util

import pytest

from gspo_jax.answers.notation import comparable, is_blank, peeled
from gspo_jax.answers.verify import accuracy, check, check_list, one_box
from gspo_jax.tasks import load_task
from gspo_jax.tasks.math_verify import decided, math_verify_apart
from gspo_jax.tasks.task import boxed_in

HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None

FORMS = [  # (a form with its number, the gold answer, the same form with another number)
    (r"\mathbf{42}", "42", r"\mathbf{41}"),
    (r"\textbf{42}", "42", r"\textbf{24}"),
    (r"\text{42}", "42", r"\text{4}"),
    ("{42}", "42", "{421}"),
    (r"\(42\)", "42", r"\(-42\)"),
    (r"\displaystyle 42", "42", r"\displaystyle 4"),
    ("(42)", "42", "(2)"),
    ("90°", "90", "9°"),
    (r"\cfrac34", "0.75", r"\cfrac43"),
    (r"1\frac12", "1.5", r"1\frac13"),
    (r"1.2\times 10^6", "1200000", r"1.2\times 10^5"),
    ("4 years", "4", "5 years"),
    ("50 mph", "50", "60 mph"),
    (r"125\textnormal{ miles}", "125", r"12\textnormal{ miles}"),
    (r"\mathbf{125\text{ miles}}", r"125\text{ miles}", r"\mathbf{125\text{ km}}"),
]
SIBLINGS = [
    (r"\mathrm{42}", "42", r"\mathrm{43}"),
    (r"\mathit{42}", "42", r"\mathit{43}"),
    (r"\boldsymbol{42}", "42", r"\boldsymbol{43}"),
    (r"\bm{-42}", "-42", r"\bm{42}"),
    (r"\textit{42}", "42", r"\textit{43}"),
    (r"\ensuremath{42}", "42", r"\ensuremath{43}"),
    (r"\left( 42 \right)", "42", r"\left( 43 \right)"),
    ("$42$", "42", "$43$"),
    ("$$42$$.", "42", "$$43$$."),
    (r"\[42\]", "42", r"\[43\]"),
    (r"\mathbf {{\textbf{42.}}}.", "42", r"\mathbf {{\textbf{43.}}}."),
    (r"1\,234", "1234", r"1\,235"),
    (r"1,\!234", "1234", r"1,\!235"),
    ("1 234 567", "1234567", "1 234 568"),
    (r"42\%", "42", r"43\%"),
    (r"42\,\mathrm{cm}", "42", r"43\,\mathrm{cm}"),
    (r"42~\textrm{cm}", "0.42 m", r"42~\textrm{mm}"),
    (r"1.2\cdot10^{-3}", "0.0012", r"1.2\cdot10^{3}"),
    ("6.02*10^23", "602000000000000000000000", "6.02*10^22"),
    (r"-2\dfrac{3}{4}", "-11/4", r"-2\dfrac{1}{4}"),
    (r"3\tfrac 12", "3.5", r"3\tfrac 13"),
    ("1 1/2", "3/2", "11/2"),  # read as eleven halves once
    (r"90^{\circ}", "90", r"91^{\circ}"),
    (r"90\degree", r"90^\circ", r"91\degree"),
    ("36 km/h", "10 m/s", "36 m/s"),
    ("60 miles per hour", "60 mph", "60 km per hour"),
    (r"5\text{ dollars per hour}", "5", r"6\text{ dollars per hour}"),
    ("12 square units", "12", "13 square units"),
    ("18 apples", r"18\text{ apples}", "18 pears"),
    (r"x^{2}+1", "x^2+1", r"x^{3}+1"),
]


@pytest.fixture(scope="module")
def checkers():
    """Both, by name; math-verify in one process for all tests of this file."""
    names = {"exact": accuracy}
    return names | ({"math-verify": math_verify_apart()} if HAS_MATH_VERIFY else {})


@pytest.mark.parametrize("checker", ["exact", "math-verify"])
def test_every_form_of_the_right_number_scores_1_and_of_another_0(checkers, checker):
    if checker not in checkers:
        pytest.skip("pip install 'gspo_jax[math]'")
    rows = FORMS + SIBLINGS
    for place, worth in ((0, 1.0), (2, 0.0)):
        texts = [rf"so \boxed{{{row[place]}}}" for row in rows]
        golds = [row[1] for row in rows]
        found = checkers[checker](prompts=["?"] * len(rows), completions=texts, answer=golds)
        assert [r for r, score in zip(rows, found, strict=True) if score != worth] == []


WRAPPERS = [r"\mathbf{#}", "{#}", r"\text{{#}}", r"\boldsymbol{#}.", r"$\displaystyle #$", r"\(#\)"]
GOLDS = [  # in the spellings of MATH
    "2", "-7", "0.35", r"\frac{3}{4}", r"-\frac{1}{2}", r"\frac{\sqrt{3}}{2}", r"2\sqrt{13}",
    r"\pi", r"\frac{3\pi}{8}", r"\left( 3, \frac{\pi}{2} \right)", "(-2,1)", "[2,5)",
    r"(-\infty, 3] \cup \{5\}", r"\{1,2,3\}", "1,2", r"1 \pm \sqrt{19}", "3x^2-7x+4", "(x+1)^2",
    r"\text{Evelyn}", r"\text{(C)}", r"\text{even}", "4210_7", "p - q", "6 - 5i", r"90^\circ",
    r"11\sqrt2", "10,080", r"5.4 \text{ cents}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
    r"x \in [-2,7]", "E", "y = 2x + 3", r"\$32{,}348", "2k", r"12 \text{ inches}",
    r"3\frac{1}{5}", "7:15", r"100 \%", r"4\sqrt{5}-8", "x=5", r"\frac43", "032",
]  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_that_says_nothing_changes_no_answer(wrapper):
    wrapped = [wrapper.replace("#", gold) for gold in GOLDS]
    left = [
        w
        for w, gold in zip(wrapped, GOLDS, strict=True)
        if not check(rf"\boxed{{{w}}}", gold).score
    ]
    assert left == []
    # and none says what its neighbour says
    others = GOLDS[1:] + GOLDS[:1]
    assert not any(
        check(rf"\boxed{{{w}}}", gold).score for w, gold in zip(wrapped, others, strict=True)
    )


@pytest.mark.parametrize("name", ["arithmetic", "reasoning", "knights", "countdown"])
def test_a_wrapper_changes_no_answer_of_a_made_up_task(name):
    task = load_task(name, sizes={"train": 0, "val": 0, "test": 12})
    for i in range(12):
        p = task.problem("test", i)
        texts = [rf"\boxed{{{w.replace('#', p.answer)}}}" for w in WRAPPERS if "." not in w]
        columns = {k: [v] * len(texts) for k, v in p.columns.items()} | {
            "answer": [p.answer] * len(texts)
        }
        found = task.reward(prompts=[p.prompt] * len(texts), completions=texts, **columns)
        assert found == [1.0] * len(texts), p


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("32, 349", "32349"),  # a pair
        ("32, 349", "32,349"),
        (r"32,\ 349", "32349"),
        ("(1,234)", "1234"),  # a point
        ("5 6", "56"),
        ("5 5", "55"),
        (r"\mathbf{4}\ \mathbf{2}", "42"),
        (r"1\frac{3}{2}", "2.5"),  # no mixed number
        (r"2\cdot 10", "20"),
        ("2^{10}", "1024"),
        (r"1.2\times 10^{9999}", "1"),
        (r"12\text{ or }13", "12"),
        (r"12\text{ or more}", "12"),
        (r"12\text{ or 13}", "12"),
        (r"\text{at least }12", "12"),
        (r"\text{not }12", "12"),
        (r"\text{negative }12", "12"),
        (r"5\text{ million}", "5"),
        (r"5\text{ dozen}", "5"),
        ("12 foo", "12"),
        ("12 or", "12"),
        ("50 mph", "50 km/h"),
        ("4 years", "4 days"),
        ("(42", "42"),
        ("42)", "42"),
        ("{42", "42"),
        ("((1))2", "12"),
        (r"\{0,1\}", "(0,1)"),
        ("{0,1}", "(0,1)"),
        ("4210_7", "4210_5"),
        ("4210", "4210_5"),
        ("7:15", "14:30"),
        ("c", "C"),
        ("D", r"\text{(C)}"),
        ("(C) or (D)", r"\text{(C)}"),
        ("(CD)", "CD"),
        ("AC", "C"),
    ],
)  # fmt: skip
def test_what_looks_like_the_answer_and_says_something_else_scores_0(answer, gold):
    assert check(rf"\boxed{{{answer}}}", gold).score == 0.0


def test_a_comma_is_read_as_the_gold_answer_has_it():
    assert check(r"\boxed{32, 349}", "32, 349").score == 1.0
    assert check(r"\boxed{32,349}", "32, 349").score == 1.0
    assert check(r"\boxed{(5,100)}", "(5, 100)").score == 1.0
    assert check(r"\boxed{32,349}", "32349").score == 1.0


@pytest.mark.parametrize("gold", [r"\text{(C)}", "C", "(C)", r"\textbf{(C)}"])
def test_letters_are_compared_as_letters_by_both_checkers(gold):
    prompt = r"Which? (A) 1 (B) 2 (C) 3 (D) 4"
    for answer in ("C", "(C)", "C)", "C.", r"\text{C}", r"\text{(C)}", r"\mathbf{(C)}", "$C$"):
        verdict, is_final = decided(prompt, rf"\boxed{{{answer}}}", gold)
        assert (verdict.score, is_final) == (1.0, True), answer
    for answer in ("D", "(D)", "(C", "c", "(A) (C)", "C, D", "ABCD", "3"):
        verdict, is_final = decided(prompt, rf"\boxed{{{answer}}}", gold)
        assert (verdict.score, is_final) == (0.0, True), answer


@pytest.mark.parametrize(
    ("prompt", "answer", "left_open"),
    [
        (r"Is it $\{1, 2\}$ or $\{2, 3\}$?", r"\{1,2\}", True),  # a list computes nothing
        (r"Which of $\pi$ and $\infty$?", r"\pi", True),
        (r"Factor $x^2-1$.", "x^2-1", False),
        (r"Find $\sin \pi$.", r"\sin\pi", False),
        ("Simplify $a-b$.", "a - b", False),
    ],
)
def test_only_an_expression_that_computes_is_a_copy_of_the_question(prompt, answer, left_open):
    verdict, is_final = decided(prompt, rf"\boxed{{{answer}}}", r"\left\{z, y\right\}")
    assert (verdict.score, is_final) == (0.0, not left_open)


def test_a_question_boxed_again_is_no_answer_in_the_new_forms_either():
    for prompt, answer, gold in [
        (r"Write $1.2 \times 10^6$ out.", r"1.2\times 10^6", "1200000"),
        (r"What is $1\frac12$ as a decimal?", r"1\frac12", "1.5"),
        ("What is 1 1/2 as a decimal?", "1 1/2", "1.5"),
    ]:
        assert accuracy([prompt], [rf"\boxed{{{answer}}}"], [gold]) == [0.0]
        assert accuracy([prompt], [rf"\boxed{{{gold}}}"], [gold]) == [1.0]
        assert accuracy([prompt], [rf"\boxed{{{answer}}}"], [answer]) == [1.0]  # as asked for


def test_boxes_of_the_question_and_empty_ones_are_blank():
    question = r"Fill in $\boxed{\phantom{2}} + 3 = 10$, or is it \boxed{9}?"
    for quoted in (
        r"\boxed{\phantom{2}}",
        r"\boxed{}",
        r"\boxed{\quad}",
        r"\boxed{9}",
        r"\boxed{\_\_}",
    ):
        for text in (rf"{quoted} is \boxed{{7}}", rf"\boxed{{7}}, so {quoted} + 3 = 10"):
            assert accuracy([question], [text], ["7"]) == [1.0], text
            assert accuracy([question], [text.replace("7", "8")], ["7"]) == [0.0]
    assert accuracy([question], [r"\boxed{9}"], ["9"]) == [1.0]  # said of one's own accord
    assert accuracy([question], [r"\boxed{7} \boxed{6}"], ["7"]) == [0.0]  # still two answers
    assert accuracy([question], [r"\boxed{9} \boxed{7} \boxed{5}"], ["7"]) == [0.0]
    assert accuracy([r"Is it \boxed{5} or \boxed{6}?"], [r"\boxed{5} \boxed{6}"], ["6"]) == [0.0]
    problem = load_task("arithmetic").problem("test", 0)
    assert boxed_in(problem, r"\boxed{7} \boxed{\,}") == "7"
    assert one_box(r"\boxed{\quad} \boxed{7}") == "7"
    assert check_list(r"\boxed{\phantom{x}} \boxed{red, blue}", "red, blue").score == 1.0
    assert check(r"\boxed{\phantom{7}}", "7").reason == "blank"
    assert not any(map(is_blank, ("0", "-", "?", r"\pi", r"\emptyset", r"\text{no}", "()")))


@pytest.mark.parametrize(
    ("answer", "gold", "may"),
    [
        ("4210_7", "4210_5", False),
        ("4210_{7}", "4210_7", True),
        ("4210", "4210_5", False),
        (r"\log_2 8", "3", True),
        (r"\{0,1\}", "(0,1)", False),
        ("{0,1}", r"\left(0,1\right)", False),
        ("[0,1]", "(0,1)", False),
        ("(0,1]", "(0,1)", False),
        (r"(-\infty,1)\cup(2,3]", r"(2,3]\cup(-\infty,1)", True),
        ("1,2", r"\{1,2\}", True),
        (r"(1,2),(3,4)", r"\{(1,2),(3,4)\}", True),
        ("7:15", "14:30", False),
        ("7:15", "7:15", True),
        (r"\frac{1}{2}", "7:14", False),
        ("(x+1)(x-1)", "x^2-1", True),
    ],
)
def test_bases_times_and_brackets_that_differ_are_not_left_to_math_verify(answer, gold, may):
    assert comparable(answer, gold) == comparable(gold, answer) == may
    if not may:
        assert decided("q", rf"\boxed{{{answer}}}", gold)[1]


def test_peeling_takes_nothing_that_belongs_to_the_answer():
    for text in (
        r"\frac{1}{2}",
        "{1}{2}",
        r"\mathbf{a}+\mathbf{b}",
        "(1,2)",
        r"\{1\}",
        "{a}_{b}",
        r"\(1\) or \(2\)x",
    ):
        assert peeled(text) == text
    assert peeled(" $ {\\mathbf {\\text{ {7}. }}} $ ") == "7"
