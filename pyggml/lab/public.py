"""Public routing traces, identified by hash and fetched with pooch from where their authors published them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from .. import config
from ..errors import DownloadError, FormatError, PyggmlError
from ..files import writing

if TYPE_CHECKING:
    from requests.exceptions import RequestException

__all__ = ["TRACES", "PublicTrace", "fetch", "traces_folder"]

_HOST = "https://raw.githubusercontent.com/"
_TIMEOUT_S = 60
_CHUNK_BYTES = 1 << 16
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
    PublicTrace("gpt-oss-20b/Polyglot-or-Not_Fact-Completion__fact_checking__False_False.json", f"{_GPT}/Polyglot-or-Not_Fact-Completion/fact_checking/False_False_examples.json", "b1892391d2045f73c86c796936bef7d62b956fbbdc897be6a9ecba5c4f79726f"),
    PublicTrace("gpt-oss-20b/gpqa_diamond__Genetics__False_False.json", f"{_GPT}/gpqa_diamond/Genetics/False_False_examples.json", "00add052d43a4f7e27c6091524af5483bff2b0c1bb9bd9eb290338809bc47c37"),
    PublicTrace("gpt-oss-20b/gpqa_diamond__Quantum_Mechanics__True_False.json", f"{_GPT}/gpqa_diamond/Quantum Mechanics/True_False_examples.json", "4d18051e1418f53cc1998a06ab1c5e15468e2915c828df546c288b499cfc71dc"),
    PublicTrace("gpt-oss-20b/gpqa_main__Analytical_Chemistry__True_False.json", f"{_GPT}/gpqa_main/Analytical Chemistry/True_False_examples.json", "017443c87a9aaac07160b1ac46e0449a41854e6244ee47e032f0fc0f190a86f8"),
    PublicTrace("gpt-oss-20b/mmlu_pro_test__biology__False_True.json", f"{_GPT}/mmlu_pro_test/biology/False_True_examples.json", "8fb8d203a786cbbaf9ba171807b474ac088b63a0cb2a5f4dec735eceec4de99e"),
    PublicTrace("gpt-oss-20b/mmlu_pro_test__economics__False_True.json", f"{_GPT}/mmlu_pro_test/economics/False_True_examples.json", "7586286a5e03f11b6b812d894bd576bd3290da615d307ae626343645abc8880a"),
    PublicTrace("gpt-oss-20b/mmlu_pro_test__engineering__False_False.json", f"{_GPT}/mmlu_pro_test/engineering/False_False_examples.json", "b125ff2442e05287a5920f0025964374ce184baff93c72bb7364e63cf7fb14b3"),
    PublicTrace("gpt-oss-20b/mmlu_pro_test__law__False_False.json", f"{_GPT}/mmlu_pro_test/law/False_False_examples.json", "85ea7a4301f11917c46071e84813833713792a9adead2bbedba7f0abe9e08077"),
    PublicTrace("gpt-oss-20b/mmlu_test__abstract_algebra__False_False.json", f"{_GPT}/mmlu_test/abstract_algebra/False_False_examples.json", "ed659c77ae029cc9f402b98ae3f99c7c358c55511a0cb1ab67f4cfb13a760b52"),
    PublicTrace("gpt-oss-20b/mmlu_test__high_school_physics__False_False.json", f"{_GPT}/mmlu_test/high_school_physics/False_False_examples.json", "e5431aef7c365a568de062f45301246d5a3f07eb81f5564cd4214f6cdbc8bd8f"),
    PublicTrace("gpt-oss-20b/mmlu_test__high_school_us_history__False_True.json", f"{_GPT}/mmlu_test/high_school_us_history/False_True_examples.json", "b1ccd5ea124904271cd662183398e7db0ee5346a5f37a75a5731d2736b049e1b"),
    PublicTrace("gpt-oss-20b/mmlu_test__professional_law__False_False.json", f"{_GPT}/mmlu_test/professional_law/False_False_examples.json", "c450a8aa20872b55b49bc5f8151017f270d157777f95f73e2999eca682f96e3d"),
    PublicTrace("gpt-oss-20b/mmlu_validation__high_school_world_history__False_False.json", f"{_GPT}/mmlu_validation/high_school_world_history/False_False_examples.json", "d6b135bb16311b167151170fbdd098cfe76f3bb7b2deb2afba3557489a2d6064"),
    PublicTrace("gpt-oss-20b/sorry_bench_base__Legal_Consulting_Advice__False_False.json", f"{_GPT}/sorry_bench_base/Legal Consulting Advice/False_False_examples.json", "827d42c975b801804c2a75941d2ee5ba76c8a00c88bcb962bb53cc3a2db7aa17"),
    PublicTrace("gpt-oss-20b/tulu3_persona_if__instruction-following__False_False.json", f"{_GPT}/tulu3_persona_if/instruction-following/False_False_examples.json", "f5e48c2d6c1c84c45e3d8cc33dea0ce03220f61cb5cf291c0a617ba6d16871dc"),
)  # fmt: skip


def traces_folder() -> Path:
    """Return the folder of public traces in the user's cache; it may not exist yet.

    Raises
    ------
    PyggmlError
        There is no home folder.
    """
    try:
        return config.cache_dir() / "traces"
    except RuntimeError:
        raise PyggmlError("there is no home folder to keep traces in", hint="name a folder") from None


def fetch(folder: Path, report: Callable[[str, int, int], None] = lambda name, done, total: None) -> list[Path]:
    """Download the public traces into a folder for `PYGGML_TRACES`, byte for byte as published.

    Files with the right hash are kept, so an interrupted call goes on where it stopped. A file appears whole or not at all.

    Parameters
    ----------
    folder : Path
        Made if it does not exist.
    report : callable, optional
        Called with a file's name, the files that are there, and all files.

    Raises
    ------
    DownloadError
        There is no network, or the host does not answer or refuses.
    FormatError
        A downloaded file has another hash.
    PyggmlError
        The disk is full, or the folder cannot be written to.
    """
    import pooch
    from requests.exceptions import RequestException

    pooch.get_logger().setLevel("WARNING")  # it tells of each file; `report` does
    urls = {trace.name: _HOST + quote(trace.source) for trace in TRACES}
    hashes = {trace.name: f"sha256:{trace.sha256}" for trace in TRACES}
    store = pooch.create(folder, _HOST, registry=hashes, urls=urls, retry_if_failed=1)
    # the files are small; as a stream, the connection of a refused one stays open
    download = pooch.HTTPDownloader(timeout=_TIMEOUT_S, chunk_size=_CHUNK_BYTES, stream=False)
    paths = []
    for i, name in enumerate(urls):
        report(name, i, len(urls))
        with writing(folder / name):
            try:
                paths.append(Path(store.fetch(name, downloader=download)))
            except RequestException as error:
                raise DownloadError(name, urls[name], _reason(error)) from None
            except ValueError:
                raise FormatError(urls[name], "this is not the file of which results were published") from None
    report("", len(urls), len(urls))
    return paths


def _reason(error: RequestException) -> str:
    """Return what the host answered, or else the innermost cause, without the address."""
    if error.response is not None:
        return f"{error.response.status_code} {error.response.reason}"
    cause = error.args[0] if error.args else error
    text = str(getattr(cause, "reason", cause))
    return text.rpartition("): ")[2]
