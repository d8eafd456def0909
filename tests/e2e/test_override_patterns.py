"""Patterns of -ot, held to what llama.cpp's own library of regular expressions finds in the same model."""

from __future__ import annotations

import llama_cpp
import pytest
from edited_models import write_edited

from pyggml.errors import GraphError
from pyggml.models.override_patterns import compile_pattern
from pyggml.session import PlacementFlags, Session

#: Forms that both read, as ECMAScript means them.
READ = [
    "exps", r"blk\.0\.", "blk.(0|1).ffn_.*_exps", "^blk", "weight$", "^output", r"ffn_(up|down|gate)_exps\.weight$", "[02]",
    "blk.[1-2]", "[^b]lk", r"\d", r"\.\d\.", r"\w+_exps", r"[\d]", r"[\w.]+exps", r"\bffn", r"attn_\B", "(?:ffn|attn)_q",
    "attn(?=_q)", "attn_(?!q)", "a.*?q", "a+?t+", "t{2}", "t{1,}", "t{1,2}n", "t{2}?", "[[:digit:]]", "[[:alpha:]_]+exps",
    "[[:upper:]]", "[^[:alnum:]]k", r"\x71", r"\u0071_norm", r"\Z", r"\A", r"\e", r"\p", r"\_q", r"\-", "a|", "()", "(a|b|)q",
    r"(t)\1", r"(t)\1n", "[a-]ttn", "[.]weight", r"[\.]", r"[\]b]lk", "[a[b]", "#", " ", "attn_#|q", "[a||b]lk", "[k&&l]", "ffn$|^out",
    "A", "(((e)))", "x*", "(?:)", ".", r"\/", r"\{", r"\}", "]", r"[\b]", r"\t|_q", r"[\n_]q", r"\0", r"^token_embd\.weight$", "$", "^",
]  # fmt: skip
#: Forms that llama.cpp refuses, or that mean something else in Python than there.
REFUSED = [
    "(", ")", "[", "a{", "t{,2}", "{2}", "*a", "+a", "(?i)BLK", "(?P<n>a)", "(?<=b)lk", "(?<!b)lk", "(?>a)", "(?#no)a", "[]a]",
    "[^]a]", "a**", "a++", "a*+", "[[:nope:]]", "\\", r"\x7", r"\u12", r"(a)\2", "[b-a]", r"\1", "[[.a.]]", "}", "a{2,1}", r"\cJ",
    "(?x)a", "(?s:a)", "(?",
]  # fmt: skip


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> tuple[list[str], dict[str, list[str] | None]]:
    """Give the weights of a model, and which of them live llama.cpp moves by each pattern; None where it refuses."""
    folder = tmp_path_factory.mktemp("patterns")
    path = write_edited(folder / "m.gguf", "qwen3moe")
    jobs = [llama_cpp.Job(str(path), [], 1, pattern=pattern) for pattern in (*READ, *REFUSED)]
    found = llama_cpp.outcomes(jobs, folder)
    every = next(list(map(str, f)) for pattern, f in zip(READ, found, strict=False) if pattern == "." and f is not None)
    return every, {j.pattern or "": None if f is None else list(map(str, f)) for j, f in zip(jobs, found, strict=True)}


def test_patterns_match_what_llama_cpp_matches(names):
    """Each form moves the weights that it moves in llama.cpp, no more and no fewer."""
    every, by_pattern = names
    differ = {}
    for pattern in READ:
        ours = [name for name in every if compile_pattern(pattern).search(name)]
        if ours != by_pattern[pattern]:
            differ[pattern] = (ours[:3], (by_pattern[pattern] or ["refused"])[:3])
    assert not differ
    assert len({tuple(by_pattern[p] or ()) for p in READ}) > 15  # they tell weights apart


@pytest.mark.parametrize("pattern", REFUSED)
def test_forms_that_differ_are_refused_by_name(pattern):
    """What llama.cpp's ECMAScript lacks, or Python reads otherwise, is an error that quotes the pattern."""
    with pytest.raises(GraphError, match="not a regular expression that") as caught:
        compile_pattern(pattern)
    assert pattern in str(caught.value)


def test_a_pattern_that_matches_nothing_is_told_with_the_nearest_names(tmp_path, caplog):
    """A typo in -ot is a warning that quotes it and names the weights that are meant, not silence."""
    path = write_edited(tmp_path / "m.gguf", "qwen3moe")
    flags = PlacementFlags(overrides=(r"blk\.1\.ffn_up_expz=CPU,attn_q=CPU", "--n-cpu-moe 2"))
    Session.open(path, data=False, devices=["sim"], placement=flags).close()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert r"-ot blk\.1\.ffn_up_expz=CPU matches no weight" in warning
    assert "blk.0.ffn_up_exps.weight" in warning
