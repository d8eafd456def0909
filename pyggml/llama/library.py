"""`find_llama` finds the shared object of llama.cpp; `LlamaLibrary` loads it and declares its functions.

The layout of llama.cpp's C structs is checked by their defaults, and by functions that came with a field. One function
is not in the C interface: the C++ symbol `llama_graph_reserve`. Builds that do not export it give fewer graphs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .. import config
from ..backends.libggml.library import Handle, Library
from ..dialect import DIALECTS, Dialect
from ..errors import DeviceUnavailableError
from .slots import FUNCTIONS, Interfaces, find_interfaces

__all__ = ["DeviceLibrary", "LlamaLibrary", "find_llama", "library_files", "reason_of"]

_KIND = "llama"

_BACKENDS = """
struct iface { void * word[40]; };
struct caps { bool is_async, host_buffer, buffer_from_host_ptr, events, mmap_support; };
struct props {
    const char * name; const char * description; size_t memory_free; size_t memory_total; int type;
    const char * device_id; struct caps caps;
};
struct cgraph_head {
    int size, n_nodes, n_leafs;
    struct ggml_tensor ** nodes; struct ggml_tensor ** grads; struct ggml_tensor ** grad_accs;
    struct ggml_tensor ** leafs;
    int32_t * use_counts; size_t hash_size; void * hash_used; void * hash_keys; int order; uint64_t uid;
};
void * ggml_backend_buffer_init(void * buft, struct iface functions, void * context, size_t size);
int ggml_backend_buffer_get_usage(void * buffer);
void ggml_backend_register(void * reg);
void * ggml_backend_dev_by_name(const char * name);
struct ggml_tensor * ggml_graph_node(void * graph, int i);
const char * ggml_op_desc(const struct ggml_tensor * t);
size_t ggml_nbytes(const struct ggml_tensor * t);
bool ggml_is_quantized(int type);
size_t ggml_row_size(int type, int64_t ne);
void ggml_backend_sched_set_copy_callback(void *, void *, void *);
"""

#: ``%s`` is the field that came with `ggml_backend_sched_set_copy_callback`.
_LLAMA = """
struct llama_model_tensor_buft_override { const char * pattern; void * buft; };
struct llama_model_params {
    void ** devices; const struct llama_model_tensor_buft_override * tensor_buft_overrides;
    int32_t n_gpu_layers; int split_mode; int load_mode; int lazy_mode; int32_t main_gpu; const float * tensor_split;
    void * progress_callback; void * progress_callback_user_data; const void * kv_overrides;
    bool vocab_only; bool check_tensors; bool use_extra_bufts; bool no_host; bool no_alloc; bool load_mtp;
};
struct llama_context_params {
    uint32_t n_ctx; uint32_t n_batch; uint32_t n_ubatch; uint32_t n_seq_max; uint32_t n_rs_seq;
    uint32_t n_outputs_max; uint32_t n_outputs_max_per_seq; int32_t n_threads; int32_t n_threads_batch;
    int ctx_type; int rope_scaling_type; int pooling_type; int attention_type; int flash_attn_type;
    float rope_freq_base; float rope_freq_scale; float yarn_ext_factor; float yarn_attn_factor;
    float yarn_beta_fast; float yarn_beta_slow; uint32_t yarn_orig_ctx; float defrag_thold;
    void * cb_eval; void * cb_eval_user_data; int type_k; int type_v; %s
    void * abort_callback; void * abort_callback_data;
    bool embeddings; bool offload_kqv; bool no_perf; bool op_offload; bool swa_full; bool kv_unified;
    void * samplers; size_t n_samplers; void * ctx_other;
};
typedef struct {
    int32_t n_tokens; int32_t * token; float * embd; int32_t * pos; int32_t * n_seq_id; int32_t ** seq_id;
    int8_t * logits;
} llama_batch;
void llama_log_set(void * callback, void * data);
void llama_backend_init(void);
const char * llama_version(void);
struct llama_model_params llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);
void * llama_model_load_from_file(const char * path, struct llama_model_params params);
void * llama_init_from_model(void * model, struct llama_context_params params);
llama_batch llama_batch_init(int32_t n_tokens, int32_t embd, int32_t n_seq_max);
void llama_batch_free(llama_batch batch);
int32_t llama_decode(void * ctx, llama_batch batch);
int32_t llama_encode(void * ctx, llama_batch batch);
bool llama_model_has_encoder(const void * model);
int32_t llama_set_adapter_cvec(void * ctx, void * data, size_t len, int32_t n_embd, int32_t il_start, int32_t il_end);
void llama_synchronize(void * ctx);
float * llama_get_logits(void * ctx);
void llama_set_n_threads(void * ctx, int32_t n_threads, int32_t n_threads_batch);
void * llama_get_memory(const void * ctx);
void llama_memory_clear(void * memory, bool data);
bool llama_memory_seq_rm(void * memory, int32_t seq, int32_t p0, int32_t p1);
int32_t llama_memory_seq_pos_min(void * memory, int32_t seq);
int32_t llama_memory_seq_pos_max(void * memory, int32_t seq);
void llama_free(void * ctx);
void llama_model_free(void * model);
uint32_t llama_n_ctx(const void * ctx);
uint32_t llama_n_ctx_seq(const void * ctx);
uint32_t llama_n_batch(const void * ctx);
uint32_t llama_n_ubatch(const void * ctx);
uint32_t llama_n_seq_max(const void * ctx);
int32_t llama_model_n_layer(const void * model);
const void * llama_model_get_vocab(const void * model);
int32_t llama_vocab_n_tokens(const void * vocab);
bool llama_vocab_is_eog(const void * vocab, int32_t token);
int32_t llama_tokenize(
    const void * vocab, const char * text, int32_t n_text, int32_t * tokens, int32_t n_most, bool special, bool parse);
int32_t llama_token_to_piece(
    const void * vocab, int32_t token, char * into, int32_t n_most, int32_t n_stripped, bool special);
int32_t llama_detokenize(
    const void * vocab, const int32_t * tokens, int32_t n_tokens, char * into, int32_t n_most, bool remove, bool unparse);
size_t llama_max_devices(void);
void * _Z19llama_graph_reserveP13llama_contextjjj(void * ctx, uint32_t n_tokens, uint32_t n_seqs, uint32_t n_outputs);
size_t llama_max_tensor_buft_overrides(void);
int _Z17common_fit_paramsPKcP18llama_model_paramsP20llama_context_paramsPfP32llama_model_tensor_buft_overridePmjPK22common_fit_extra_model14ggml_log_level(
    const char * path, struct llama_model_params * model, struct llama_context_params * context, float * tensor_split,
    struct llama_model_tensor_buft_override * overrides, size_t * margins, uint32_t n_ctx_min, const void * extra,
    int log_level);
struct gguf_init_params { bool no_alloc; void ** ctx; };
void * gguf_init_from_file(const char * fname, struct gguf_init_params params);
void gguf_free(void * ctx);
void * llama_model_init_from_user(void * metadata, void * set_tensor_data, void * data, struct llama_model_params params);
"""
_RESERVE = "_Z19llama_graph_reserveP13llama_contextjjj"
_FIT = (
    "_Z17common_fit_paramsPKcP18llama_model_paramsP20llama_context_paramsPfP32llama_model_tensor_buft_overridePmj"
    "PK22common_fit_extra_model14ggml_log_level"
)
_WARNING, _CONTINUED = 3, 5


def _file_names() -> tuple[str, ...]:
    return {"win32": ("llama.dll",), "darwin": ("libllama.dylib",)}.get(sys.platform, ("libllama.so",))


def find_llama(given: str = "") -> Path:
    """Return the shared object of llama.cpp.

    Parameters
    ----------
    given : str
        A file, or the folder of a build; if empty, ``PYGGML_LIBLLAMA``, else the installed package.

    Raises
    ------
    DeviceUnavailableError
        There is no llama.cpp.
    """
    given = given or config.libllama_path()
    if given:
        path = Path(given).expanduser()
        places = [path / below / name for below in ("", "bin", "lib", "lib64") for name in _file_names()]
        found = next((p for p in places if p.is_file()), None) if path.is_dir() else path
        if found is None or not found.is_file():
            raise DeviceUnavailableError(
                _KIND, f"there is no llama.cpp at {given}", hint=f"name the folder that has {_file_names()[0]}"
            )
        return found.resolve()
    spec = importlib.util.find_spec("xllamacpp")
    if spec is not None and spec.origin is not None:
        modules = sorted(Path(spec.origin).parent.glob("xllamacpp*.so"))
        if modules:
            return modules[0].resolve()
    hint = f"{config.install_hint('llama')}, or set PYGGML_LIBLLAMA to the folder of a build of llama.cpp"
    raise DeviceUnavailableError(_KIND, "llama.cpp is not installed", hint=hint)


def reason_of(lines: Iterable[str], otherwise: str = "") -> str:
    """Return llama.cpp's first line about an error, without the function's name; the rest follows from it."""
    told = (line.strip() for line in lines if re.search(r"error|failed|unsupported|missing|invalid", line))
    return re.sub(r"^\w+: ", "", next(told, otherwise))


def library_files(path: Path) -> list[Path]:
    """Return the library's shared objects: itself, and those of ggml in the same folder."""
    beside = [
        p for p in path.parent.iterdir() if p.name.startswith(("libggml", "ggml", "libllama")) and ".so" in p.name
    ]
    return sorted({path, *(p.resolve() for p in beside if p.is_file())})


class DeviceLibrary(Library):
    """A ggml in this process that accepts devices written in Python.

    Attributes
    ----------
    interfaces : Interfaces
        Layout of the build's interfaces.
    dialect : Dialect
        The rules of its scheduler: ggml's version alone does not tell them.
    has_heads : bool
        Whether the head of a graph is laid out as ``cgraph_head``, with the list of nodes after it.
    has_uids : bool
        Whether ``cgraph_head.uid`` is a graph's number.

    Raises
    ------
    DeviceUnavailableError
        It cannot be loaded, is not a ggml, or its structs have an unknown layout.
    """

    interfaces: Interfaces

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.ffi.cdef(FUNCTIONS)
        self.ffi.cdef(_BACKENDS)
        self.interfaces = find_interfaces(self)
        self.has_copy_callback = self.has("ggml_backend_sched_set_copy_callback")
        self.dialect = self._find_dialect()
        self._look_at_heads()

    def _find_dialect(self) -> Dialect:
        """Return the latest dialect that is not later than the build."""
        version = (
            max(self.version_tuple[:2], (0, 27)) if self.has_copy_callback else min(self.version_tuple[:2], (0, 26))
        )
        known = [d for d in DIALECTS.values() if tuple(map(int, d.version.split("."))) <= version]
        return known[-1] if known else next(iter(DIALECTS.values()))

    def _look_at_heads(self) -> None:
        context = self.new_context(1, graph_size=16)
        head = self.ffi.cast("struct cgraph_head *", self.lib.ggml_new_graph_custom(context, 16, False))
        sizes = (head.size, head.n_nodes, head.n_leafs, head.order)
        self.has_heads = sizes == (16, 0, 0, 0) and head.nodes == self.ffi.cast("void *", head + 1)
        self.has_uids = (
            self.has_heads and self.version_tuple >= (0, 26) and head.uid == 0 and 16 <= head.hash_size < 1 << 10
        )

    def head_of(self, view: Handle) -> Handle:
        """Return the head of the graph whose first nodes a view has; NULL if it is not found."""
        if not self.has_heads:
            return self.ffi.NULL
        head = self.ffi.cast("struct cgraph_head *", view.nodes) - 1
        return head if head.nodes == view.nodes and head.n_nodes >= view.n_nodes else self.ffi.NULL


class LlamaLibrary(DeviceLibrary):
    """llama.cpp in this process.

    Attributes
    ----------
    on_line : callable
        Called with each line that llama.cpp logs.
    warning : str
        The last warning or error.

    Raises
    ------
    DeviceUnavailableError
        It cannot be loaded, is not a llama.cpp, or its structs have an unknown layout.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.ffi.cdef(_LLAMA % ("size_t moe_cache_size;" if self.has_copy_callback else ""))
        if not self.has("llama_model_load_from_file"):
            raise self._refuse("it has no llama_model_load_from_file")
        self.on_line: Callable[[str], None] = lambda line: None
        self.warning = ""
        self._take_llama_log()
        self.lib.llama_backend_init()
        self._check_params()

    def _take_llama_log(self) -> None:
        """Pass each line to `on_line`; warnings and errors also go to standard error, in case the process ends."""
        is_loud = False

        def write(level: int, text: Handle, _: Handle) -> None:
            nonlocal is_loud
            if level != _CONTINUED:
                is_loud = level >= _WARNING
            line = self.text(text)
            if is_loud:
                self.warning = line.strip() or self.warning
                os.write(2, line.encode(errors="replace"))
            self.on_line(line)

        self._llama_log = self.ffi.callback("void(int, const char *, void *)", write)
        self.lib.llama_log_set(self._llama_log, self.ffi.NULL)

    def _check_params(self) -> None:
        """Compare the defaults of llama.cpp's structs with the expected values."""
        c = self.lib.llama_context_default_params()
        m = self.lib.llama_model_default_params()
        context = (c.n_ctx, c.n_ubatch, c.type_k, c.type_v, c.offload_kqv, c.op_offload, c.n_samplers)
        model = (m.n_gpu_layers < 0, m.vocab_only, m.no_alloc, m.use_extra_bufts)
        if context != (512, 512, 1, 1, True, True, 0) or model != (True, False, False, True):
            raise self._refuse("its llama_context_params or llama_model_params are laid out in another way")

    def _fit_function(self) -> Handle:
        """Return `common_fit_params`, which builds with shared libraries have in a library of their own."""
        beside = sorted(
            p for p in self.path.parent.iterdir() if re.match(r"(lib)?llama-common\.(so|dylib|dll)", p.name)
        )
        for library in (self.lib, *(self.ffi.dlopen(str(p)) for p in beside)):
            if (found := getattr(library, _FIT, None)) is not None:
                return found
        raise self._refuse("neither it nor a libllama-common beside it exports common_fit_params")

    @property
    def build(self) -> str:
        """llama.cpp's version; empty if the build does not tell it."""
        return self.text(self.lib.llama_version()) if self.has("llama_version") else ""

    def decode(self, ctx: Handle, tokens: Sequence[int], start: int, n_out: int, seq: int = 0) -> int:
        """Decode a sequence's tokens from a position on, with logits of the last ``n_out``; return llama.cpp's status."""
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        try:
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
                batch.seq_id[i][0] = seq
                batch.logits[i] = i >= len(tokens) - n_out
            batch.n_tokens = len(tokens)
            return int(self.lib.llama_decode(ctx, batch))
        finally:
            self.lib.llama_batch_free(batch)

    @property
    def reserves(self) -> bool:
        """Whether the build exports `llama_graph_reserve`."""
        return self.has(_RESERVE)

    def reserve(self, ctx: Handle, n_tokens: int, n_seqs: int, n_outputs: int) -> Handle:
        """Return the graph with which llama.cpp reserves memory; it is valid until the next call."""
        return getattr(self.lib, _RESERVE)(ctx, n_tokens, n_seqs, n_outputs)

    def fit(
        self,
        path: str,
        model: Handle,
        context: Handle,
        shares: Handle,
        overrides: Handle,
        margins: Handle,
        n_ctx_min: int,
    ) -> int:
        """Change parameters so that a model fits, by `common_fit_params`; return its status, 0 for success.

        Raises
        ------
        DeviceUnavailableError
            Neither the build nor a ``libllama-common`` beside it exports it.
        """
        return int(
            self._fit_function()(
                path.encode(), model, context, shares, overrides, margins, n_ctx_min, self.ffi.NULL, _WARNING
            )
        )
