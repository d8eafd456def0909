"""Real llama.cpp as an oracle: ``python llama_cpp.py JOBS.json OUT.npz`` writes its logits, one array for each job, and
what `GGML_SCHED_DEBUG=2` printed of the first decode.

It runs in a child process (`logits`), through the C API that the extension of xllamacpp exports, so that its thread pool
and ours never meet. The two parameter structures are those of b11434, with the one field more of builds that have an
expert cache; the defaults that come back are checked, so that another layout is an error and not nonsense.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MODEL_PARAMS = """
    void ** devices; void * tensor_buft_overrides; int32_t n_gpu_layers; int split_mode; int load_mode; int lazy_mode;
    int32_t main_gpu; const float * tensor_split; void * progress_callback; void * progress_callback_user_data;
    const void * kv_overrides;
    bool vocab_only; bool check_tensors; bool use_extra_bufts; bool no_host; bool no_alloc; bool load_mtp;
"""
CONTEXT_PARAMS = """
    uint32_t n_ctx; uint32_t n_batch; uint32_t n_ubatch; uint32_t n_seq_max; uint32_t n_rs_seq;
    uint32_t n_outputs_max; uint32_t n_outputs_max_per_seq; int32_t n_threads; int32_t n_threads_batch;
    int ctx_type; int rope_scaling_type; int pooling_type; int attention_type; int flash_attn_type;
    float rope_freq_base; float rope_freq_scale; float yarn_ext_factor; float yarn_attn_factor;
    float yarn_beta_fast; float yarn_beta_slow; uint32_t yarn_orig_ctx; float defrag_thold;
    void * cb_eval; void * cb_eval_user_data; int type_k; int type_v; %s
    void * abort_callback; void * abort_callback_data;
    bool embeddings; bool offload_kqv; bool no_perf; bool op_offload; bool swa_full; bool kv_unified;
    void * samplers; size_t n_samplers; void * ctx_other;
"""
FUNCTIONS = """
typedef struct {
    int32_t n_tokens; int32_t * token; float * embd; int32_t * pos; int32_t * n_seq_id; int32_t ** seq_id; int8_t * logits;
} llama_batch;
void llama_log_set(void * callback, void * data);
void llama_backend_init(void);
struct llama_model_params llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);
void * ggml_backend_cpu_buffer_type(void);
struct override { const char * pattern; void * buft; };
void * llama_model_load_from_file(const char * path, struct llama_model_params params);
void llama_model_free(void * model);
void * llama_init_from_model(void * model, struct llama_context_params params);
void llama_free(void * context);
const void * llama_model_get_vocab(const void * model);
int32_t llama_vocab_n_tokens(const void * vocab);
int32_t llama_tokenize(const void * vocab, const char * text, int32_t text_len, int32_t * tokens, int32_t n_tokens_max,
                       bool add_special, bool parse_special);
llama_batch llama_batch_init(int32_t n_tokens, int32_t embd, int32_t n_seq_max);
void llama_batch_free(llama_batch batch);
int32_t llama_decode(void * ctx, llama_batch batch);
void * llama_get_memory(void * ctx);
void llama_memory_clear(void * memory, bool data);
bool llama_memory_seq_rm(void * memory, int32_t seq, int32_t p0, int32_t p1);
void llama_memory_seq_cp(void * memory, int32_t src, int32_t dst, int32_t p0, int32_t p1);
float * llama_get_logits_ith(void * ctx, int32_t i);
"""
TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "IQ4_NL": 20, "BF16": 30,
}  # fmt: skip


def library() -> Path:
    """Return the shared object of xllamacpp, which is of the test extra.

    Raises
    ------
    RuntimeError
        It is not installed.
    """
    spec = importlib.util.find_spec("xllamacpp")
    found = None if spec is None or spec.origin is None else next(Path(spec.origin).parent.glob("*.so"), None)
    if found is None:
        raise RuntimeError("xllamacpp is not installed: pip install -e '.[test]'")
    return found


@dataclass(frozen=True)
class Job:
    """A model to load, and tokens to decode in batches."""

    model: str
    tokens: list[int]
    batch: int
    kv: str = "F32"
    flash: bool = False
    text: str | None = None  #: to be turned into tokens, instead of decoding: its ids are what comes back
    special: bool = False  #: with `text`: special tokens are added and their names are read
    steps: list[dict[str, Any]] | None = None  #: of several sequences, instead of `tokens`; see `Llama.step`
    ubatch: int = 0  #: most tokens of one graph; as many as a batch by default
    n_seqs: int = 1
    unified: bool = False
    pattern: str | None = None  #: of -ot, instead of decoding: the names that it matches are what comes back


def run_jobs(jobs: Sequence[Job], folder: Path) -> list[npt.NDArray[np.float32]]:
    """Return llama.cpp's logits for each token of each job, from one child process: float32, (n_token, n_vocab)."""
    return [logits for logits, _ in run_jobs_with_logs(jobs, folder)]


def run_jobs_with_logs(jobs: Sequence[Job], folder: Path) -> list[tuple[npt.NDArray[np.float32], str]]:
    """Return logits, and the text of `GGML_SCHED_DEBUG=2` for each job's first decode."""
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    command = [sys.executable, __file__, str(folder / "jobs.json"), str(folder / "out.npz")]
    environment = os.environ | {"GGML_SCHED_DEBUG": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "out.npz") as out:
        return [(out[str(i)], str(out[f"log{i}"])) for i in range(len(jobs))]


def outcomes(jobs: Sequence[Job], folder: Path) -> list[npt.NDArray[Any] | None]:
    """Return what each job asks for, or None where llama.cpp refuses it, be it by ending its process."""
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    first = 0
    while first < len(jobs):
        command = [sys.executable, __file__, str(folder / "jobs.json"), str(folder), str(first)]
        environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
        done = subprocess.run(command, capture_output=True, timeout=200, check=False, env=environment)
        started = sum((folder / f"started-{i}").exists() for i in range(len(jobs)))
        assert started > first, done.stderr.decode(errors="replace")
        first = started
    found: list[npt.NDArray[Any] | None] = []
    for i in range(len(jobs)):
        (folder / f"started-{i}").unlink()
        path = folder / f"out-{i}.npy"
        found.append(np.load(path) if path.exists() else None)
        path.unlink(missing_ok=True)
    return found


def logits(
    model: Path, tokens: Sequence[int], folder: Path, *, batch: int, kv: str = "F32", flash: bool = False
) -> npt.NDArray[np.float32]:
    """Return llama.cpp's logits for each token: float32, (n_token, n_vocab)."""
    return run_jobs([Job(str(model), list(map(int, tokens)), batch, kv, flash)], folder)[0]


@functools.cache
def bind() -> tuple[Any, Any]:
    """Return cffi's view of the library, and the library."""
    import cffi

    ffi = cffi.FFI()
    so = str(library())
    probe = cffi.FFI()
    probe.cdef("void ggml_backend_sched_set_copy_callback(void *, void *, void *);")
    newer = hasattr(probe.dlopen(so), "ggml_backend_sched_set_copy_callback")
    context = CONTEXT_PARAMS % ("size_t moe_cache_size;" if newer else "")
    ffi.cdef(f"struct llama_model_params {{{MODEL_PARAMS}}}; struct llama_context_params {{{context}}};" + FUNCTIONS)
    return ffi, ffi.dlopen(so)


class Llama:
    """One model with one context, on the CPU alone."""

    def __init__(
        self,
        path: str,
        n_ctx: int,
        n_batch: int,
        kv: str,
        flash: bool,
        *,
        threads: int = 1,
        repack: bool = False,
        pattern: str | None = None,
        n_ubatch: int = 0,
        n_seqs: int = 1,
        unified: bool = False,
    ) -> None:
        self.ffi, self.lib = bind()
        ffi = self.ffi
        self.log: list[bytes] = []
        self.quiet = ffi.callback(
            "void(int, const char *, void *)", lambda level, text, data: self.log.append(ffi.string(text))
        )
        self.lib.llama_log_set(self.quiet, ffi.NULL)
        self.lib.llama_backend_init()
        cp = self.lib.llama_context_default_params()
        found = (cp.n_ctx, cp.n_ubatch, cp.type_k, cp.type_v, cp.offload_kqv, cp.op_offload, cp.n_samplers)
        if found != (512, 512, 1, 1, True, True, 0):
            raise SystemExit(f"llama_context_params has another layout in this build: its defaults read as {found}")
        mp = self.lib.llama_model_default_params()
        mp.n_gpu_layers, mp.use_extra_bufts = 0, repack
        if pattern is not None:
            kept = ffi.new("char[]", pattern.encode())
            buft = self.lib.ggml_backend_cpu_buffer_type()
            overrides = ffi.new("struct override[]", [(kept, buft), (ffi.NULL, ffi.NULL)])
            mp.tensor_buft_overrides = overrides
        self.context = ffi.NULL
        self.model = model = self.lib.llama_model_load_from_file(path.encode(), mp)
        cp.n_ctx, cp.n_batch, cp.n_ubatch = n_ctx, n_batch, n_ubatch or n_batch
        cp.n_threads, cp.n_threads_batch, cp.n_seq_max, cp.kv_unified = threads, threads, n_seqs, unified
        cp.flash_attn_type, cp.type_k, cp.type_v = int(flash), TYPES[kv], TYPES[kv]
        if model == ffi.NULL:
            raise SystemExit(f"llama.cpp does not load {path}")
        self.context = self.lib.llama_init_from_model(model, cp)
        self.vocab = self.lib.llama_model_get_vocab(model)
        self.n_vocab = self.lib.llama_vocab_n_tokens(self.vocab)

    def tokenize(self, text: str, *, special: bool = False) -> npt.NDArray[np.int32]:
        """Return the ids of a text, with or without special tokens."""
        raw = text.encode()
        ids = self.ffi.new("int32_t[]", len(raw) + 8)
        n = self.lib.llama_tokenize(self.vocab, raw, len(raw), ids, len(raw) + 8, special, special)
        return np.array(list(ids[0:n]), np.int32)

    def step(self, step: dict[str, Any]) -> npt.NDArray[np.float32]:
        """Decode ``tokens`` at ``pos`` of ``seqs``, or forget (``rm``) or share (``cp``) a sequence, which gives no logits."""
        memory = self.lib.llama_get_memory(self.context)
        if "rm" in step and not self.lib.llama_memory_seq_rm(memory, step["rm"], -1, -1):
            raise SystemExit(f"llama_memory_seq_rm refuses {step['rm']}")
        if "cp" in step:
            self.lib.llama_memory_seq_cp(memory, *step["cp"], -1, -1)
        if "tokens" not in step:
            return np.empty((0, self.n_vocab), np.float32)
        return self.decode(np.asarray(step["tokens"], np.int32), step["pos"], seqs=step["seqs"])

    def decode(
        self,
        tokens: npt.NDArray[np.int32],
        pos: int | list[int],
        *,
        only_last: bool = False,
        seqs: list[int] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return the logits of each token of a batch, or of the last; positions follow the first, or are given."""
        n = len(tokens)
        places = [pos + i for i in range(n)] if isinstance(pos, int) else pos
        batch = self.lib.llama_batch_init(n, 0, 1)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), places[i], 1
            batch.logits[i] = not only_last or i == n - 1
            batch.seq_id[i][0] = 0 if seqs is None else seqs[i]
        batch.n_tokens = n
        status = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        if status:
            raise SystemExit(f"llama_decode gave {status}")
        wanted = [n - 1] if only_last else range(n)
        rows = (self.ffi.buffer(self.lib.llama_get_logits_ith(self.context, i), 4 * self.n_vocab) for i in wanted)
        return np.stack([np.frombuffer(row, np.float32).copy() for row in rows])

    def overridden(self) -> npt.NDArray[np.str_]:
        """Return the names of the weights that the pattern matched, in the order in which they were made."""
        found = re.findall(r"tensor (\S+) \(.*buffer type overridden", b"".join(self.log).decode(errors="replace"))
        return np.array(list(dict.fromkeys(found)), np.str_)

    def close(self) -> None:
        """Free the context and the model."""
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def clear(self) -> None:
        """Forget all tokens."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)


def open_job(job: Job) -> Llama:
    """Return the model of a job with a context that holds its tokens."""
    n_ctx = -(-max(len(job.tokens), 256) // 256) * 256
    return Llama(
        job.model, n_ctx * job.n_seqs, min(n_ctx, max(job.batch, 64)), job.kv, job.flash, pattern=job.pattern,
        n_ubatch=job.ubatch, n_seqs=job.n_seqs, unified=job.unified,
    )  # fmt: skip


def main() -> None:
    """Do the jobs of a file and save the logits."""
    jobs_file, out = sys.argv[1:3]
    jobs = [Job(**entry) for entry in json.loads(Path(jobs_file).read_text())]
    if len(sys.argv) > 3:
        save_each(jobs, Path(out), int(sys.argv[3]))
    else:
        save_all(jobs, out)


def save_all(jobs: Sequence[Job], out_file: str) -> None:
    """Save logits, or ids, and logs in one file."""
    out: dict[str, npt.NDArray[Any]] = {}
    for i, job in enumerate(jobs):
        tokens = np.asarray(job.tokens, np.int32)
        llama = open_job(job)
        if job.text is not None:
            out[str(i)], out[f"log{i}"] = llama.tokenize(job.text), np.array("")
            continue
        llama.log.clear()
        if job.steps is not None:
            out[str(i)], out[f"log{i}"] = np.concatenate([llama.step(step) for step in job.steps]), np.array("")
            continue
        parts = [llama.decode(tokens[: job.batch], 0)]
        out[f"log{i}"] = np.array(b"".join(llama.log).decode())
        parts += [llama.decode(tokens[k : k + job.batch], k) for k in range(job.batch, len(tokens), job.batch)]
        out[str(i)] = np.concatenate(parts)
    np.savez(out_file, **out)


def save_each(jobs: Sequence[Job], folder: Path, first: int) -> None:
    """Save logits of the jobs from ``first`` on as they come, with a sign that a job was begun."""
    for i, job in enumerate(jobs[first:], first):
        (folder / f"started-{i}").touch()
        tokens = np.asarray(job.tokens, np.int32)
        try:
            llama = open_job(job)
            if job.pattern is not None:
                np.save(folder / f"out-{i}.npy", llama.overridden())
            elif job.text is not None:
                np.save(folder / f"out-{i}.npy", llama.tokenize(job.text, special=job.special))
            else:
                np.save(folder / f"out-{i}.npy", llama.decode(tokens, 0))
            llama.close()
        except SystemExit:
            continue


if __name__ == "__main__":
    main()
