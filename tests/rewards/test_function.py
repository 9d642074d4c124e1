import hashlib
import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.rewards.function import FunctionReward, find_function
from rlhf_exp.rewards.protocol import RewardError
from rlhf_exp.settings import ConfigError, Fingerprinted
from tests.builders import completions
from tests.rewards.test_samples import HELLO, with_rows

CPU = torch.device("cpu")
SHOWN = r"samples\[{0}\]: prompt 'p{0}', completion '{1}'"


@pytest.fixture(autouse=True)
def as_before(monkeypatch, tmp_path):
    """The test's folder is the current one; what it makes importable is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    yield
    for name in sys.modules.keys() - modules:
        del sys.modules[name]


def write(source: str, name: str = "scores.py") -> str:
    """The path of a file with the source."""
    path = Path(name).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return str(path)


def score(source: str, record=None) -> list[float]:
    """What the function f of the source gives, for the texts a, bb and ccc unless told."""
    function = FunctionReward(function=f"{write(source)}:f").load(CPU)
    return function(batch("a", "bb", "ccc") if record is None else record).tolist()


def batch(*texts: str):
    return completions(texts, before=[f"p{i}" for i in range(len(texts))])


def refused(source: str, match: str, record=None, name: str = "f") -> RewardError:
    function = FunctionReward(function=f"{write(source)}:{name}").load(CPU)
    with pytest.raises(RewardError, match=match) as caught:
        function(batch("a", "bb", "ccc") if record is None else record)
    return caught.value


def test_a_function_gets_prompts_completions_ids_and_columns_by_name():
    source = """
seen = []
def f(*args, **columns):
    assert not args
    seen.append(columns)
    return [0.5, -2]
"""
    rows = [{"prompt": "one", "answer": 1, "tag": "x"}, {"prompt": "two", "answer": 2}]
    name = f"{write(source)}:f"
    scores = FunctionReward(function=name).load(CPU)(with_rows(["yes no", "no"], rows))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [0.5, -2.0]
    assert find_function(name)[1].seen == [
        {
            "prompts": ["one", "two"],
            "completions": ["yes no", "no"],
            "completion_ids": [[1, 1], [1]],
            "answer": [1, 2],
            "tag": ["x", None],
        }
    ]


def test_a_conversation_comes_as_messages():
    source = """
def f(prompts, completions):
    assert [m["role"] for m in prompts[0]] == ["system", "user"]
    return [len(c[0]["content"]) + 10 * (c[0]["role"] == "assistant") for c in completions]
"""
    assert score(source, with_rows(["four"], [{"prompt": "x", "messages": HELLO}])) == [14.0]


@pytest.mark.parametrize(
    "signature",
    [
        "completions",
        "completions, answer",
        "answer, *, completions, prompts",
        "completions, other=3, answer=None",
        "self=None, completions=None",
        "completions, **others",
        "**others",
        "first=0, /, *rest, completions",
    ],
)
def test_a_function_gets_what_its_signature_names(signature):
    source = f"""
def f({signature}):
    given = locals()
    given |= given.pop("others", {{}})
    assert given.get("answer", [5]) == [5]
    assert given.get("other", 3) == 3
    return [len(given["completions"][0])]
"""
    record = with_rows(["four"], [{"prompt": "p", "answer": 5, "unnamed": 6}])
    assert score(source, record) == [4.0]


@pytest.mark.parametrize(
    "body",
    [
        "async def f(completions): await asyncio.sleep(0); return [len(c) for c in completions]",
        "async def g(n): return [n] * 3\nf = lambda completions: g(1)",
        "class F:\n    async def __call__(self, completions): return [2] * 3\nf = F()",
    ],
)
def test_a_coroutine_is_awaited(body):
    expected = {"async def f": [1.0, 2.0, 3.0], "async def g": [1.0] * 3}.get(body[:11], [2.0] * 3)
    assert score(f"import asyncio\n{body}\n") == expected


def test_all_calls_share_a_loop_that_is_closed_with_the_function():
    source = """
import asyncio
loops = []
async def f(completions):
    loops.append(asyncio.get_running_loop())
    return [1.0]
"""
    name = f"{write(source)}:f"
    function = FunctionReward(function=name).load(CPU)
    for _ in range(2):
        function(batch("a"))
    first, second = find_function(name)[1].loops
    assert first is second
    assert not first.is_closed()
    del function
    assert first.is_closed()


def test_a_function_that_is_not_async_may_run_its_own_loop():
    source = """
import asyncio
async def one(text): return len(text)
def f(completions):
    async def all_of_them(): return await asyncio.gather(*map(one, completions))
    return asyncio.run(all_of_them())
"""
    assert score(source) == [1.0, 2.0, 3.0]


def test_a_coroutine_that_hangs_does_not_keep_the_next_call_from_its_loop():
    source = """
import asyncio
calls, released = [], []
async def f(completions):
    calls.append(1)
    is_first = len(calls) == 1
    while is_first and not released: await asyncio.sleep(0.005)
    return [2.0] * len(completions)
"""
    reward = FunctionReward(function=f"{write(source)}:f")
    score, module = reward.load(CPU), find_function(reward.function)[1]
    thread = threading.Thread(target=score, args=(batch("a"),), daemon=True)
    thread.start()
    while not module.calls:
        time.sleep(0.005)
    assert score(batch("a")).tolist() == [2.0]
    assert thread.is_alive()
    module.released.append(1)
    thread.join(10)
    assert score(batch("a")).tolist() == [2.0]


def test_arrays_and_tensors_are_scores_too():
    assert score("import numpy as np\ndef f(completions): return np.arange(3)") == [0.0, 1.0, 2.0]
    assert score("import torch\ndef f(completions): return torch.ones(3, requires_grad=True)") == [
        1.0,
        1.0,
        1.0,
    ]


# What is found, and what is not.


def test_a_module_is_found_in_the_current_folder(tmp_path):
    write("def f(completions): return [1.0]", "here/deep.py")
    assert FunctionReward(function="here.deep:f").load(CPU)(batch("a")).tolist() == [1.0]
    assert str(tmp_path) in sys.path


def test_a_module_written_meanwhile_is_found():
    with pytest.raises(ConfigError, match="there is no module late_one in"):
        FunctionReward(function="late_one:f").load(CPU)
    write("def f(completions): return [1.0]", "late_one.py")
    FunctionReward(function="late_one:f").load(CPU)


def test_a_file_may_import_its_neighbours_and_be_named_from_here():
    write("def length(text): return len(text)", "sub/neighbour_of_it.py")
    write("from neighbour_of_it import length\ndef f(completions): return [7.0]", "sub/mine.py")
    reward = FunctionReward(function="sub/mine.py:f")
    assert reward.load(CPU)(batch("a")).tolist() == [7.0]
    write("def g(completions): return [8.0]", "here.py")
    assert FunctionReward(function="here.py:g").load(CPU)(batch("a")).tolist() == [8.0]


def test_a_neighbour_hides_no_library(tmp_path):
    write("1 / 0", "sub/colorsys.py")
    source = "import colorsys\ndef f(completions): return [colorsys.rgb_to_yiq(1, 1, 1)[0]]"
    reward = FunctionReward(function=f"{write(source, 'sub/mine.py')}:f")
    assert reward.load(CPU)(batch("a")).tolist() == [1.0]
    FunctionReward(function=f"{write(source + ' ', 'sub/other.py')}:f").load(CPU)
    assert sys.path.count(str(tmp_path / "sub")) == 1


def test_a_folder_may_have_a_colon_in_its_name():
    path = write("def f(completions): return [1.0]", "a:b/mine.py")
    FunctionReward(function=f"{path}:f").load(CPU)


def test_a_file_in_the_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write("def f(completions): return [1.0]", "home/mine.py")
    FunctionReward(function="~/mine.py:f").load(CPU)


def test_a_file_is_run_once_and_again_when_it_has_changed(monkeypatch):
    source = "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = {}\n"
    source += "runs = []\ndef f(completions): runs.append(1); return [float(A().x)] * len(runs)\n"
    reward = FunctionReward(function=f"{write(source.format(3))}:f")
    assert reward.load(CPU)(batch("a")).tolist() == [3.0]
    assert reward.load(CPU)(batch("a", "b")).tolist() == [3.0, 3.0]
    # At the same second and of the same size, as no cache of bytecode would notice.
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for x in (4, 5):
        os.utime(write(source.format(x)), (1e9, 1e9))
        assert reward.load(CPU)(batch("a")).tolist() == [float(x)]


def test_files_of_one_name_and_content_are_two_modules():
    source = "def f(completions): return [float(len(__file__))]"
    one, other = write(source, "a/mine.py"), write(source, "abc/mine.py")
    a, b = (FunctionReward(function=f"{p}:f").load(CPU)(batch("a")).item() for p in (one, other))
    assert (a, b) == (len(one), len(other))


@pytest.mark.parametrize("function", ["scores", "scores.py", ":f", "scores:", ":"])
def test_a_name_without_module_or_callable_is_refused(function):
    write("def f(completions): return []")
    expected = f"reward.function={function}: give module:callable or path/to/file.py:callable"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        FunctionReward(function=function).load(CPU)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        FunctionReward(function=function).fingerprint()


def test_an_empty_name_is_refused():
    with pytest.raises(ValidationError, match="at least 1 character"):
        FunctionReward(function="")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("missing_one:f", r"there is no module missing_one in .*by its path, with \.py"),
        ("missing_one.sub:f", "there is no module missing_one in"),
        ("json.missing:f", r"there is no module json\.missing in"),
        ("nowhere/at_all.py:f", r"cannot read .*nowhere/at_all\.py: No such file"),
        ("nowhere/at_all:f", "cannot read .*nowhere/at_all: No such file"),
        ("./plain:f", r"plain is not a Python file; its name must end in \.py"),
        ("folder.py:f", r"cannot read .*folder\.py: Is a directory"),
    ],
)
def test_a_module_or_file_that_is_not_there_is_refused(function, said, tmp_path):
    write("x", "plain")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(ConfigError, match=f"^reward.function={re.escape(function)}: .*{said}"):
        FunctionReward(function=function).load(CPU)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "import sklearnish\n",
            r"raised ModuleNotFoundError: No module named 'sklearnish' at .*broken\.py:1$",
        ),
        (
            "\nfrom json import nothing_such\n",
            r"raised ImportError: cannot import name .* at .*broken\.py:2$",
        ),
        ("x = 1\nx.y\n", r"raised AttributeError: 'int' .* at .*broken\.py:2$"),
        ("import sys\nsys.exit(3)\n", r"raised SystemExit: 3 at .*broken\.py:2$"),
        ("def f(:\n", r"raised SyntaxError: .*broken\.py, line 1\)$"),
        ("import helps_broken\n", r"raised ZeroDivisionError: .* at .*helps_broken\.py:2$"),
        ("raise ValueError\n", r"raised ValueError at .*broken\.py:1$"),
    ],
)
@pytest.mark.parametrize("place", ["broken", "broken.py"])
def test_what_the_users_module_raises_is_told_as_such(source, said, place):
    write("\n1 / 0\n", "helps_broken.py")
    write(source, "broken.py")
    action = r"importing broken" if place == "broken" else r"running .*/broken\.py"
    for _ in range(2):  # a module that failed is not taken for one that is loaded
        with pytest.raises(ConfigError, match=rf"^reward.function={place}:f: {action} {said}") as e:
            FunctionReward(function=f"{place}:f").load(CPU)
        assert e.value.__cause__ is not None


def test_a_name_that_the_module_lacks_is_refused_with_near_ones():
    path = write("def score_it(completions): ...\ndef other(completions): ...\n_score_if = other\n")
    expected = r"there is no score_if in .*scores\.py; did you mean score_it\?$"
    with pytest.raises(ConfigError, match=expected):
        FunctionReward(function=f"{path}:score_if").load(CPU)
    with pytest.raises(ConfigError, match=r"there is no zzz in .*; it has score_it, other$"):
        FunctionReward(function=f"{path}:zzz").load(CPU)
    with pytest.raises(ConfigError, match=r"there is no zzz in .*; it has no functions$"):
        FunctionReward(function=f"{write('x = 1')}:zzz").load(CPU)
    write("def nothing(): ...", "colorsys.py")  # which is Python's before it is ours
    with pytest.raises(ConfigError, match=r"there is no nothing in .*/lib/.*/colorsys\.py; it has"):
        FunctionReward(function="colorsys:nothing").load(CPU)
    many = "".join(f"def a{i}(): ...\n" for i in range(9))
    with pytest.raises(ConfigError, match=r"it has a0, a1, a2, a3, a4, a5, a6, a7, \.\.\.$"):
        FunctionReward(function=f"{write(many)}:zzz").load(CPU)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("f = 3", "f is not a function but int 3; name a callable"),
        ("f = None", "f is not a function but NoneType None; name a callable"),
        ("def f(prompts): ...", r"it takes \(prompts\), but must take the keyword completions"),
        ("def f(completions, /): ...", r"it takes \(completions, /\), but must take the keyword"),
        ("def f(*completions): ...", r"it takes \(\*completions\), but must take the keyword"),
        ("f = dict", "its signature cannot be read; wrap it in a def"),
    ],
)
def test_what_cannot_be_called_with_completions_is_refused(source, said):
    reward = FunctionReward(function=f"{write(source)}:f")
    for find in (lambda: reward.load(CPU), reward.fingerprint):
        with pytest.raises(ConfigError, match=said):
            find()


# What goes wrong while it runs.


def test_the_first_sample_that_makes_it_raise_is_named_with_cause_and_line():
    source = """
import json
def f(prompts, completions):
    return [json.loads(c) for c in completions]
"""
    error = refused(
        source,
        r"^reward\.function=.*scores\.py:f raised JSONDecodeError: Expecting value: .*"
        r" at .*/scores\.py:4\nit also fails for one sample by itself, "
        + SHOWN.format(1, "b")
        + "$",
        batch("1", "b", "c"),
    )
    assert type(error.__cause__).__name__ == "JSONDecodeError"


def test_a_sample_is_sought_with_fresh_arguments_of_its_own():
    source = """
def f(prompts, completions, completion_ids, answer, absent=None):
    assert absent is None
    if len(prompts) == 1 and answer == [2] and completion_ids == [[1]]:
        assert (prompts, completions) == (["b"], ["y"])
        raise ValueError("found")
    if len(prompts) > 1:
        completions.clear()
        prompts[0] = 1
        raise KeyError("changed the lists, then failed")
    assert completions
"""
    rows = [{"prompt": p, "answer": i} for i, p in enumerate("aab")]
    error = refused(
        source,
        r"raised KeyError: .*changed the lists.*:10\nit also fails for one sample by itself,"
        r" samples\[2\]: prompt 'b', completion 'y'$",
        with_rows(["x", "y y", "y"], rows),
    )
    assert isinstance(error.__cause__, KeyError)


def test_that_no_sample_alone_makes_it_raise_is_said():
    source = """
async def f(completions):
    if len(completions) > 1:
        raise RuntimeError("no more\\nthan one")
    return [0.0]
"""
    refused(
        source,
        r"raised RuntimeError: no more than one at .*scores\.py:4\nit fails for none of the"
        r" 3 samples by itself; the first is " + SHOWN.format(0, "a") + "$",
    )


def test_a_reward_error_of_the_users_is_told_as_any_other():
    source = """
from rlhf_exp.rewards.protocol import RewardError
def f(completions):
    raise RewardError("of mine")
"""
    said = r"^reward\.function=.* raised RewardError: of mine at .*:4\nit also fails for one sample"
    refused(source, said + " by itself, " + SHOWN.format(0, "a") + "$")


def test_what_python_itself_refuses_has_no_line():
    refused(
        "def f(x, /, completions): ...", r"raised TypeError: .*argument: 'x'\nit also fails for one"
    )


def test_a_keyboard_interrupt_is_left_alone():
    path = write("""
calls = []
def f(completions):
    calls.append(1)
    if len(calls) == 1:
        raise KeyboardInterrupt
""")
    with pytest.raises(KeyboardInterrupt):
        FunctionReward(function=f"{path}:f").load(CPU)(batch("a"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("None", "gave None instead of scores"),
        ("'abc'", "gave str 'abc' instead of scores"),
        ("[1.0]", r"gave 1 scores for 3 samples(.|\n)*" + SHOWN.format(0, "a")),
        (
            "[1.0, float('nan'), None]",
            r"gave nan as scores\[1\] \(2 such(.|\n)*" + SHOWN.format(1, "bb"),
        ),
    ],
)
def test_what_are_no_scores_is_refused(given, said):
    refused(f"def f(completions): return {given}", rf"^reward\.function=.*scores\.py:f {said}")


def test_an_empty_list_that_the_function_made_of_its_argument_is_too_short():
    refused(
        "def f(completions): completions.clear(); return completions",
        "gave 0 scores for 3 samples",
    )


def test_a_column_that_the_samples_lack_is_named():
    rows = [{"prompt": "a", "source": 1}]
    refused(
        "def f(completions, answer, source, *, level, extra=1, **others): ...",
        r"needs answer, level, but the samples have no column of that name; there are prompts,"
        r" completions, completion_ids, source\nsamples\[0\]: prompt 'a', completion 'x'$",
        with_rows(["x"], rows),
    )


@pytest.mark.parametrize("column", ["prompts", "completions", "completion_ids"])
def test_a_column_called_as_an_argument_of_ours_is_refused(column):
    refused(
        "def f(completions): return [0.0]",
        f"the dataset has a column '{column}', .*rename the column\nsamples",
        with_rows(["x"], [{"prompt": "a", column: 1}]),
    )


# Fingerprints.


def sha(*paths: str) -> str:
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()


def test_the_fingerprint_is_the_hash_of_the_functions_file():
    path = write("def f(completions): return [1.0]")
    reward = FunctionReward(function=f"{path}:f")
    assert isinstance(reward, Fingerprinted)
    assert reward.fingerprint() == sha(path)
    before = reward.fingerprint()
    write("def f(completions): return [2.0]")
    assert reward.fingerprint() == sha(path) != before


def test_the_fingerprint_follows_both_the_named_module_and_the_functions_own():
    own = write("def make(completions, k): return [k]\nclass C:\n    def __call__(self, **_): ...")
    own = str(Path(own).rename("where_it_is.py").resolve())
    for value in ("make", "functools.partial(make, k=1)", "C()", "C().__call__"):
        named = write(f"import functools\nfrom where_it_is import *\nf = {value}\n")
        if value == "make":
            named = write("from where_it_is import *\nf = lambda **_: make\n")
            assert FunctionReward(function=f"{named}:make").fingerprint() == sha(named, own)
            assert FunctionReward(function=f"{named}:f").fingerprint() == sha(named)
        else:
            assert FunctionReward(function=f"{named}:f").fingerprint() == sha(named, own), value


def test_what_a_decorator_wraps_is_what_counts():
    other = write(
        "import functools\ndef d(f):\n    @functools.wraps(f)\n    def g(**k): return f(**k)\n"
        "    return g\n",
        "decorates.py",
    )
    inner = write("from decorates import d\n@d\ndef f(completions): return [1.0]\n", "inner_one.py")
    named = write("from inner_one import f\n")
    assert FunctionReward(function=f"{named}:f").fingerprint() == sha(named, inner)
    assert other not in (named, inner)


def test_what_is_in_no_file_has_no_fingerprint():
    module = type(sys)("made_by_hand")
    module.f = eval("lambda completions: [1.0]")
    called = {"__module__": "made_by_hand", "__call__": lambda self, completions: [1.0]}
    module.g = type("G", (), called)()
    sys.modules["made_by_hand"] = module
    for name in ("f", "g"):
        reward = FunctionReward(function=f"made_by_hand:{name}")
        assert reward.fingerprint() == ""
        assert reward.load(CPU)(batch("a")).tolist() == [1.0]


@pytest.mark.parametrize("raised", ["sys.exit(3)", "raise asyncio.CancelledError('gone')"])
def test_what_is_no_exception_is_told_with_its_sample_too(raised):
    source = f"""
import asyncio, sys

def f(completions):
    if "bb" in completions:
        {raised}
    return [0.0] * len(completions)
"""
    error = refused(source, "raised (SystemExit|CancelledError)")
    assert re.search("one sample by itself, " + SHOWN.format(1, "bb"), str(error))
