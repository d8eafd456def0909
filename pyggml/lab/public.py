"""Public routing traces, identified by hash and fetched from where their authors published them."""

from __future__ import annotations

import gzip
import hashlib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import FormatError, PyggmlError
from ..files import aside

__all__ = ["TRACES", "PublicTrace", "fetch"]

_HOST = "https://raw.githubusercontent.com/"
_MAX_BYTES = 1 << 26
_BIG = (
    "Helldez/BigMoeOnEdge/2d4f2b11db128cbe32da738ce114c0479542f458/docs/bench-data/2026-07-15-route-trace"  # Apache-2.0
)
_ONNX = "justinchuby/onnx-genai/ac9c7dd067dd7ff620fbe27b38b524adfa6fd946/scripts"  # MIT
_GPT = "AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting/72b368f60045221f21eeb65debb27d58de92e565/data"  # Apache-2.0


class PublicTrace(NamedTuple):
    """A file's name, its source (repository, commit, path), and its SHA-256."""

    name: str
    source: str
    sha256: str


TRACES = (
    PublicTrace("bigmoeonedge/gemma.route.csv", f"{_BIG}/gemma.route.csv", "0f20f2e604d72084ca3bb1ad99540d5d70d2ee66f7003d55f5d51582b8a0af20"),
    PublicTrace("bigmoeonedge/gemma-curve.csv", f"{_BIG}/gemma-curve.csv", "c18701a6f3a3a6c411c659ccb729c43976e09130c9eba16a7e27a9a3d7e06503"),
    PublicTrace("bigmoeonedge/gptoss.route.csv", f"{_BIG}/gptoss.route.csv", "e5446f184d0f5327506637f0ca8c4a5a053373ed45cddf73c2199f20ce706e5e"),
    PublicTrace("bigmoeonedge/gptoss-curve.csv", f"{_BIG}/gptoss-curve.csv", "a799ffd8df157cd0ce2cb4ed176f7f27b020619195f208152259fada7f9ee0ed"),
    PublicTrace("bigmoeonedge/qwen.route.csv", f"{_BIG}/qwen.route.csv", "38257865c1447b5659b19696392f63df3bfcc1763b8050cb5a463b0aa999ead9"),
    PublicTrace("bigmoeonedge/qwen-curve.csv", f"{_BIG}/qwen-curve.csv", "8b0b140c732ab1656720dcb18dbb7626177f7d8a8dd6998fd1224a8d0cb08c30"),
    PublicTrace("onnx-genai/moe_expert_trace.json", f"{_ONNX}/moe_expert_trace.json", "055c3fd06dbb79cc7321caa530b015c239ed7dfd6b1e60834ddbb68231756fe9"),
    PublicTrace("onnx-genai/moe_cache_sim_results.json", f"{_ONNX}/moe_cache_sim_results.json", "73e3e0c05118dc04152ce72f0dc8e22632db9123fad811ec4857d54659c71030"),
    PublicTrace("gpt-oss-20b/Polyglot-or-Not_Fact-Completion__fact_checking__False_False.json.gz", f"{_GPT}/Polyglot-or-Not_Fact-Completion/fact_checking/False_False_examples.json", "b1892391d2045f73c86c796936bef7d62b956fbbdc897be6a9ecba5c4f79726f"),
    PublicTrace("gpt-oss-20b/gpqa_diamond__Genetics__False_False.json.gz", f"{_GPT}/gpqa_diamond/Genetics/False_False_examples.json", "00add052d43a4f7e27c6091524af5483bff2b0c1bb9bd9eb290338809bc47c37"),
    PublicTrace("gpt-oss-20b/gpqa_diamond__Quantum_Mechanics__True_False.json.gz", f"{_GPT}/gpqa_diamond/Quantum Mechanics/True_False_examples.json", "4d18051e1418f53cc1998a06ab1c5e15468e2915c828df546c288b499cfc71dc"),
    PublicTrace("gpt-oss-20b/gpqa_main__Analytical_Chemistry__True_False.json.gz", f"{_GPT}/gpqa_main/Analytical Chemistry/True_False_examples.json", "017443c87a9aaac07160b1ac46e0449a41854e6244ee47e032f0fc0f190a86f8"),
    PublicTrace("gpt-oss-20b/mmlu_pro_test__biology__False_True.json.gz", f"{_GPT}/mmlu_pro_test/biology/False_True_examples.json", "8fb8d203a786cbbaf9ba171807b474ac088b63a0cb2a5f4dec735eceec4de99e"),
    PublicTrace("gpt-oss-20b/mmlu_pro_test__economics__False_True.json.gz", f"{_GPT}/mmlu_pro_test/economics/False_True_examples.json", "7586286a5e03f11b6b812d894bd576bd3290da615d307ae626343645abc8880a"),
    PublicTrace("gpt-oss-20b/mmlu_pro_test__engineering__False_False.json.gz", f"{_GPT}/mmlu_pro_test/engineering/False_False_examples.json", "b125ff2442e05287a5920f0025964374ce184baff93c72bb7364e63cf7fb14b3"),
    PublicTrace("gpt-oss-20b/mmlu_pro_test__law__False_False.json.gz", f"{_GPT}/mmlu_pro_test/law/False_False_examples.json", "85ea7a4301f11917c46071e84813833713792a9adead2bbedba7f0abe9e08077"),
    PublicTrace("gpt-oss-20b/mmlu_test__abstract_algebra__False_False.json.gz", f"{_GPT}/mmlu_test/abstract_algebra/False_False_examples.json", "ed659c77ae029cc9f402b98ae3f99c7c358c55511a0cb1ab67f4cfb13a760b52"),
    PublicTrace("gpt-oss-20b/mmlu_test__high_school_physics__False_False.json.gz", f"{_GPT}/mmlu_test/high_school_physics/False_False_examples.json", "e5431aef7c365a568de062f45301246d5a3f07eb81f5564cd4214f6cdbc8bd8f"),
    PublicTrace("gpt-oss-20b/mmlu_test__high_school_us_history__False_True.json.gz", f"{_GPT}/mmlu_test/high_school_us_history/False_True_examples.json", "b1ccd5ea124904271cd662183398e7db0ee5346a5f37a75a5731d2736b049e1b"),
    PublicTrace("gpt-oss-20b/mmlu_test__professional_law__False_False.json.gz", f"{_GPT}/mmlu_test/professional_law/False_False_examples.json", "c450a8aa20872b55b49bc5f8151017f270d157777f95f73e2999eca682f96e3d"),
    PublicTrace("gpt-oss-20b/mmlu_validation__high_school_world_history__False_False.json.gz", f"{_GPT}/mmlu_validation/high_school_world_history/False_False_examples.json", "d6b135bb16311b167151170fbdd098cfe76f3bb7b2deb2afba3557489a2d6064"),
    PublicTrace("gpt-oss-20b/sorry_bench_base__Legal_Consulting_Advice__False_False.json.gz", f"{_GPT}/sorry_bench_base/Legal Consulting Advice/False_False_examples.json", "827d42c975b801804c2a75941d2ee5ba76c8a00c88bcb962bb53cc3a2db7aa17"),
    PublicTrace("gpt-oss-20b/tulu3_persona_if__instruction-following__False_False.json.gz", f"{_GPT}/tulu3_persona_if/instruction-following/False_False_examples.json", "f5e48c2d6c1c84c45e3d8cc33dea0ce03220f61cb5cf291c0a617ba6d16871dc"),
)  # fmt: skip


def fetch(folder: Path, report: Callable[[str], None] = lambda name: None) -> list[Path]:
    """Download the public traces into a folder for `PYGGML_TRACES`; files with the right hash are kept.

    Raises
    ------
    PyggmlError
        A download fails.
    FormatError
        A downloaded file has another hash.
    """
    made = []
    for trace in TRACES:
        target = folder / trace.name
        made.append(target)
        if target.is_file() and _sha256(target) == trace.sha256:
            continue
        report(trace.name)
        try:
            with urllib.request.urlopen(_HOST + urllib.parse.quote(trace.source), timeout=60) as answer:
                data = answer.read(_MAX_BYTES)
        except (OSError, urllib.error.URLError) as error:
            raise PyggmlError(f"{trace.name} cannot be fetched ({error})", hint="is there a network?") from None
        if hashlib.sha256(data).hexdigest() != trace.sha256:
            raise FormatError(trace.source, "what came is another file than the one that results were published of")
        target.parent.mkdir(parents=True, exist_ok=True)
        with aside(target) as part:
            part.write_bytes(gzip.compress(data, mtime=0) if target.suffix == ".gz" else data)
    return made


def _sha256(path: Path) -> str:
    data = path.read_bytes()
    try:
        return hashlib.sha256(gzip.decompress(data) if path.suffix == ".gz" else data).hexdigest()
    except (OSError, EOFError):
        return ""
