"""A verifier may raise, return nonsense, hang, print or kill its process: every call still gets its reward."""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from gvjax.judges.verifier import Verifier, VerifierError

FUNCTIONS = """
import os, subprocess, sys, time

def number(prompt, completion):
    return float(completion)

def act(prompt, completion):
    if completion == "raise":
        raise KeyError("no such answer")
    if completion == "exit":
        sys.exit("bye")
    if completion == "die":
        os._exit(7)
    if completion == "hang":
        time.sleep(60)
    if completion == "slow":
        time.sleep(0.3)
    if completion == "noise":
        print('{"value": 99.0}')
        print("plain", flush=True)
        os.write(1, b'{"value": 98.0}\\n')
        sys.stdin.read()
    return {
        "nan": float("nan"), "inf": float("inf"), "huge": 1e39, "bignum": 10**400, "text": "0.5",
        "none": None, "complex": 1j, "true": True, "integer": 3,
    }.get(completion, 0.25)

class Grader:
    @staticmethod
    def grade(prompt, completion):
        return len(prompt) + 10 * len(completion)

def numpy_number(prompt, completion):
    import numpy
    return numpy.float32(0.5) if completion == "scalar" else numpy.zeros(2)

def platform(prompt, completion):
    return float(os.environ["JAX_PLATFORMS"] == "cpu" and "jax" not in sys.modules)

def with_child(prompt, completion):
    child = subprocess.Popen(["sleep", "60"])
    open(completion, "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(60)

not_a_function = 3
"""


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    (tmp_path / "graders_for_test.py").write_text(FUNCTIONS)
    (tmp_path / "broken_for_test.py").write_text("raise RuntimeError('half written')")
    monkeypatch.syspath_prepend(tmp_path)


def make(name="act", **options):
    options = {"time_limit": 10.0, "max_error_share": 1.0, **options}
    return Verifier(f"graders_for_test:{name}", **options)


def alive(pid):
    state = pathlib.Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pid, within=60.0):
    end = time.monotonic() + within
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_rewards_come_in_the_order_of_the_completions():
    with make("number") as verifier:
        values = np.random.default_rng(0).normal(size=50).astype(np.float32)
        rewards = verifier(["p"] * 50, [repr(float(value)) for value in values])
        np.testing.assert_array_equal(rewards, values)
        assert rewards.dtype == np.float32
        assert verifier.calls == 50
        assert verifier.errors == {}


def test_both_texts_arrive_whole():
    with make("Grader.grade") as verifier:
        odd = 'quote " backslash \\ newline \n tab \t nul \0 é 漢 \ud800 \u2028'
        long = "x" * 300_000
        rewards = verifier([odd, "", long], ["", odd, long])
        np.testing.assert_array_equal(
            rewards, [len(odd), 10 * len(odd), np.float32(11 * len(long))]
        )


@pytest.mark.parametrize(
    ("completion", "kind", "said"),
    [
        ("raise", "raised", "KeyError: 'no such answer'"),
        ("exit", "raised", "SystemExit: bye"),
        ("nan", "not finite", "nan"),
        ("inf", "not finite", "inf"),
        ("huge", "not finite", "1e+39"),
        ("bignum", "not finite", "inf"),
        ("text", "not a number", "str '0.5'"),
        ("none", "not a number", "NoneType"),
        ("complex", "not a number", "complex"),
        ("die", "died", "exit code 7"),
    ],
)
def test_what_goes_wrong_is_counted_and_costs_only_its_own_reward(
    completion, kind, said
):
    with make(error_reward=-2.0) as verifier:
        rewards = verifier(
            ["first", "second", "third", "fourth"],
            ["good", completion, completion, "good"],
        )
        np.testing.assert_array_equal(rewards, [0.25, -2.0, -2.0, 0.25])
        assert list(verifier.errors) == [kind]
        assert verifier.errors[kind].count == 2
        assert said in verifier.errors[kind].first
        assert "'second'" in verifier.errors[kind].first
        assert verifier.calls == 4


@pytest.mark.parametrize(("completion", "value"), [("true", 1.0), ("integer", 3.0)])
def test_whole_numbers_and_truth_values_are_numbers(completion, value):
    with make() as verifier:
        assert verifier(["p"], [completion]) == value
        assert not verifier.errors


def test_numpy_scalars_are_numbers_and_arrays_are_not():
    with make("numpy_number") as verifier:
        np.testing.assert_array_equal(
            verifier(["p"] * 2, ["scalar", "array"]), [0.5, 0]
        )
        assert verifier.errors["not a number"].count == 1


def test_a_hanging_call_is_cut_off_and_the_next_one_served():
    with make(time_limit=0.5) as verifier:
        begun = time.monotonic()
        rewards = verifier(["p"] * 3, ["good", "hang", "good"])
        assert 0.5 <= time.monotonic() - begun < 10
        np.testing.assert_array_equal(rewards, [0.25, 0, 0.25])
        assert verifier.errors["timed out"].count == 1
        assert "0.5 s" in verifier.errors["timed out"].first


def test_a_slow_call_within_the_limit_is_no_error():
    with make(time_limit=5.0) as verifier:
        np.testing.assert_array_equal(verifier(["p"], ["slow"]), [0.25])
        assert not verifier.errors


def test_the_limit_is_of_one_call_not_of_the_batch():
    with make(time_limit=3.0) as verifier:
        verifier(["p"] * 12, ["slow"] * 12)
        assert not verifier.errors


def test_what_the_function_prints_is_not_taken_for_an_answer(capfd):
    with make() as verifier:
        rewards = verifier(["p"] * 3, ["noise", "integer", "noise"])
        np.testing.assert_array_equal(rewards, [0.25, 3.0, 0.25])
    assert "plain" in capfd.readouterr().err


def test_a_batch_with_too_many_errors_is_refused_as_soon_as_that_is_certain():
    with make(max_error_share=0.25) as verifier:
        rewards = verifier(["p"] * 8, ["nan", "raise"] + ["good"] * 6)
        np.testing.assert_array_equal(rewards[:3], [0, 0, 0.25])
        with pytest.raises(
            VerifierError, match=r"3 of the first 4 completions of a batch of 8, 37.5%"
        ) as caught:
            verifier(["p"] * 8, ["nan", "good", "raise", "nan"] + ["good"] * 4)
        assert "2 not finite, 1 raised" in str(caught.value)
        assert "returned nan" in str(caught.value)
        assert "25.0%" in str(caught.value)
        assert verifier.calls == 12


def test_no_error_is_allowed_at_share_zero():
    with make(max_error_share=0.0) as verifier:
        verifier(["p"], ["good"])
        with pytest.raises(VerifierError):
            verifier(["p"] * 100, ["good"] * 99 + ["raise"])


def test_the_process_keeps_off_the_accelerator(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with make("platform") as verifier:
        assert verifier(["p"], ["c"]) == 1.0


def test_what_a_cut_off_call_started_ends_with_it(tmp_path):
    with make("with_child", time_limit=5.0) as verifier:
        note = tmp_path / "pids"
        verifier(["p"], [str(note)])
        pids = [int(pid) for pid in note.read_text().split()]
        assert len(pids) == 2
        assert all(gone(pid) for pid in pids)


def test_the_process_ends_with_its_owner_even_in_the_middle_of_a_call(tmp_path):
    note = tmp_path / "pids"
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from gvjax.judges.verifier import Verifier\n"
        "verifier = Verifier('graders_for_test:with_child', time_limit=600.0)\n"
        f"verifier(['p'], [{str(note)!r}])\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], cwd=os.getcwd())
    end = time.monotonic() + 300
    while not (note.exists() and note.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    child = int(note.read_text().split()[0])
    assert alive(child)
    owner.kill()
    owner.wait()
    assert gone(child)


def test_closing_ends_the_process_and_a_later_call_starts_another():
    verifier = make("number")
    assert verifier(["p"], ["1"]) == 1
    pid = verifier._child._process.pid
    verifier.close()
    assert gone(pid)
    assert verifier(["p"], ["2"]) == 2
    verifier.close()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_package_anywhere:f", "ModuleNotFoundError"),
        ("graders_for_test:missing", "AttributeError.*missing"),
        ("broken_for_test:f", "RuntimeError: half written"),
        ("graders_for_test:not_a_function", "is of type int, which cannot be called"),
        ("graders_for_test", "write package.module:function"),
        ("graders_for_test:", "write package.module:function"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused_at_once(path, said):
    with pytest.raises(ValueError, match=said):
        Verifier(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"time_limit": 0.0}, "time_limit is 0.0"),
        ({"time_limit": float("nan")}, "time_limit is nan"),
        ({"error_reward": float("nan")}, "error_reward is nan"),
        ({"max_error_share": 1.5}, "max_error_share is 1.5"),
    ],
)
def test_impossible_arguments_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        make(**options)


def test_prompts_and_completions_must_be_as_many():
    with make() as verifier, pytest.raises(ValueError, match="2 prompts and 1"):
        verifier(["a", "b"], ["c"])
