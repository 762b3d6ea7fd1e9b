"""Verifiers of puzzles: right answers are right, all others are not, and nothing that a completion says is ever run."""

import json
import time

import pytest

from gvjax.data import puzzles

KNOWN = {
    "countdown": {"numbers": [2, 3, 10], "target": 16},
    "word_ladder": {
        "start_word": "CAT",
        "end_word": "DOG",
        "words": ["CAT", "COT", "COG", "DOG"],
    },
    "graph_color": {
        "puzzle": {
            "vertices": [0, 1, 2],
            "edges": [[0, 1], [1, 2]],
            "color_options": [1, 2],
        }
    },
    "palindrome_generation": {"letters": ["a", "b", "a"]},
    "prime_factorization": {"number": 12},
    "kakurasu": {"row_sums": [1, 2], "col_sums": [1, 2]},
    "mini_sudoku": {"puzzle": [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]},
    "chain_sum": {"answer": "1234"},
    "gcd": {"answer": "6"},
    "letter_counting": {"answer": "2"},
    "spell_backward": {"answer": "nus"},
}
SUDOKU = "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1"
RIGHT = {
    "countdown": ["2*3+10", "10 + (3 * 2)", "-(-10) + 2 * 3", "I think: #### 3*2+10"],
    "word_ladder": ["CAT,COT,COG,DOG", "cat, cot, cog, dog"],
    "graph_color": ['{"0": 1, "1": 2, "2": 1}'],
    "palindrome_generation": ["aba", " ABA\n"],
    "prime_factorization": ["2 × 2 × 3", "3*2*2"],
    "kakurasu": ["1 0\n0 1"],
    "mini_sudoku": [SUDOKU],
    "chain_sum": ["1234", "1,234", "It is 1234."],
    "gcd": ["6"],
    "letter_counting": ["2"],
    "spell_backward": ["nus"],
}
WRONG = {
    "countdown": ["10+3+2", "16", "2*3+10+0", "2*3*10", "10/0+2*3", "2*3+True*10", "x"],
    "word_ladder": ["CAT,DOG", "CAT,COT,DOG", "CAT,CAG,COG,DOG", "COT,COG,DOG", "CAT"],
    "graph_color": [
        '{"0": 1, "1": 1, "2": 2}',
        '{"0": 1, "1": 2}',
        '{"0": 1, "1": 2, "2": 3}',
        '{"0": true, "1": 2, "2": 1}',
        "[1, 2, 1]",
    ],
    "palindrome_generation": ["bab", "abba", "aab"],
    "prime_factorization": ["4 × 3", "2 × 3", "1 × 2 × 2 × 3", "2 × 2 × 3 × x", "0"],
    "kakurasu": ["0 1\n1 0", "1 0", "1 0\n0 1\n0 0", "1 0\n0 2"],
    "mini_sudoku": [
        "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 2",
        "2 1 3 4\n3 4 1 2\n1 2 4 3\n4 3 2 1",
        "1 2 3 4\n2 1 4 3\n3 4 1 2\n4 3 2 1",
    ],
    "chain_sum": ["1233", "1234 or 5"],
    "gcd": ["3"],
    "letter_counting": ["two"],
    "spell_backward": ["sun"],
}
NASTY = [
    "",
    "open('written','w').write('x')",
    "__import__('os').system('touch written')",
    "9**9**9**9",
    "9" * 5000,
    "(" * 90,
    "[" * 3900,
    '{"0": ' * 500,
    "-" * 95 + "1",
    "\x00",
    "１６",
    "2*3+10\nprint()",
]


def answer(task: str) -> str:
    return json.dumps({"task": task, **KNOWN[task]})


@pytest.mark.parametrize("task", puzzles.VERIFIERS)
def test_right_and_wrong_answers(task):
    for text in RIGHT[task]:
        assert puzzles.is_right(text, answer(task)), text
    for text in WRONG[task]:
        assert not puzzles.is_right(text, answer(task)), text


@pytest.mark.parametrize("task", puzzles.VERIFIERS)
def test_nothing_is_run_and_nothing_hangs(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = time.perf_counter()
    for text in NASTY:
        assert not puzzles.is_right(text, answer(task)), text
    assert time.perf_counter() - begun < 30
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_made_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no verifier for task 'n_queens'"):
        puzzles.write("n_queens", tmp_path, {"train": 1})
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'gvjax\[puzzles\]'"):
        puzzles.write("countdown", tmp_path, {"train": 1})


OPTIONS = {
    "countdown": {"min_numbers": 3, "max_numbers": 3, "max_value": 20},
    "word_ladder": {"min_word_length": 3, "max_word_length": 3},
    "graph_color": {"min_num_vertices": 5, "max_num_vertices": 5},
}


@pytest.mark.slow
@pytest.mark.parametrize("task", puzzles.VERIFIERS)
def test_the_packages_own_solutions_are_right(task, tmp_path):
    gym = pytest.importorskip("reasoning_gym")
    options = OPTIONS.get(task, {})
    puzzles.write(task, tmp_path, {"train": 20, "test": 5}, options=options)
    rows = [
        json.loads(line)
        for split in ("train", "test")
        for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()
    ]
    assert len({row["prompt"] for row in rows}) == 25
    made = gym.create_dataset(task, size=100, seed=0, **options)
    entries = {entry["question"]: entry for entry in made}
    for row, other in zip(rows, [*rows[1:], rows[0]]):
        assert puzzles.is_right(row["completion"], row["answer"])
        entry = entries[row["prompt"]]
        # The package's scorer, on its own strings only.
        theirs = made.score_answer(other["completion"], entry) == 1.0
        assert puzzles.is_right(other["completion"], row["answer"]) == theirs
