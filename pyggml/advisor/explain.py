"""Why a plan has a flag: its other values, with the rest of the best plan, and what they would come to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..foresight import Setting
from ..types import Type
from .answer import Recommendation
from .maker import BEST, Maker
from .settings import DEFAULT_BATCH, EXPLAIN, Space

__all__ = ["Choice", "Explanation", "explain", "flag_name"]

_NAMES = {
    "--n-cpu-moe": "-ncmoe", "--cpu-moe": "-ncmoe", "-cmoe": "-ncmoe", "--n-cpu-ffn": "-ncffn", "--n-gpu-layers": "-ngl", "--gpu-layers": "-ngl",
    "--ubatch-size": "-ub", "--batch-size": "-b", "--flash-attn": "-fa", "--threads": "-t", "--ctx-size": "-c",
    "--cache-type-k": "-ctk", "--cache-type-v": "-ctv", "--no-kv-offload": "-nkvo", "--tensor-split": "-ts",
    "--override-tensor": "-ot", "--mmap": "--no-mmap", "-lm": "--no-mmap", "--load-mode": "--no-mmap", "--op-offload": "--no-op-offload",
}  # fmt: skip


def flag_name(flag: str) -> str | None:
    """Return the flag of `EXPLAIN` that a user means, with or without its dashes; None if there is none."""
    for name in (flag, f"-{flag}", f"--{flag}"):
        if _NAMES.get(name, name) in EXPLAIN:
            return _NAMES.get(name, name)
    return None


@dataclass(frozen=True, slots=True)
class Choice:
    """A value of a flag.

    Attributes
    ----------
    flags : str
        The value, or all flags that differ from the best plan.
    prompt_s, generate_s : float
        By the formulas that rank settings.
    missing_bytes : int
        0: it fits.
    """

    flags: str
    prompt_s: float
    generate_s: float
    missing_bytes: int
    is_chosen: bool

    @property
    def seconds(self) -> float:
        """Of prompt and answer."""
        return self.prompt_s + self.generate_s


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a flag does here.

    Attributes
    ----------
    flag : str
        Its name in `EXPLAIN`.
    choices : list of Choice
        Empty if nothing can be chosen on this machine.
    verdict : str
        One sentence with the number that decides.
    """

    flag: str
    choices: list[Choice]
    verdict: str


def explain(maker: Maker, space: Space, settings: list[Setting], best: Recommendation, flag: str) -> Explanation:
    """Return what the values of a flag come to on the machine of a plan."""
    tried = list(dict.fromkeys([best.setting, *_values(maker, space, settings, best.setting, flag)]))
    choices = [_choice(maker, s, best.setting, flag) for s in tried]
    if flag == "--moe-cache-mib":
        return Explanation(flag, choices, _of_cache(maker, settings, best))
    if flag == "--moe-cache-misses":
        return Explanation(flag, choices if len(choices) > 1 else [], _of_misses(maker, best))
    if flag == "-c":
        goal = maker.search.goal
        gib = maker.search.memory.kv_bytes(best.setting) / 2**30
        told = f"The context is what you ask for: at least {goal.prompt + goal.generate} tokens; the KV cache of {goal.context} takes {gib:.2f} GiB."
        return Explanation(flag, [], told)
    others = [c for c in choices if not c.is_chosen]
    fitting = min((c for c in others if not c.missing_bytes), key=lambda c: c.seconds, default=None)
    if fitting is None:
        return Explanation(
            flag, choices if others else [], "No other value fits." if others else "It has no other value here."
        )
    ratio = fitting.seconds / choices[0].seconds
    verdict = f"The next best value that fits, {fitting.flags}, takes {f'{ratio:.2f} times ' if ratio >= 1.005 else ''}as long."
    return Explanation(flag, sorted(choices, key=lambda c: c.seconds), verdict)


def _values(maker: Maker, space: Space, settings: list[Setting], best: Setting, flag: str) -> Iterable[Setting]:
    """Return the best setting with other values of a flag."""
    n, host = maker.search.memory.n_layer, maker.search.machine.host
    if flag == "-ngl":
        at = n + 1 if best.n_gpu_layers < 0 else best.n_gpu_layers
        near = {0, n // 2, at - 4, at - 1, at + 1, at + 4} & set(range(n + 1))
        return [replace(best, n_gpu_layers=k) for k in (-1, *sorted(near, reverse=True)) if maker.search.machine.cards]
    if flag == "-ncmoe":
        all_but = {best.n_cpu_moe + k for k in (-4, -1, 1, 4)} | {0, n}
        return [replace(best, n_cpu_moe=k) for k in sorted(all_but & set(space.n_cpu_moe))]
    if flag == "-ncffn":
        at = _n_cpu_ffn(best)
        if maker.search.shape.n_expert or not maker.search.machine.cards or len(best.overrides) > (at > 0):
            return []
        near = {0, at - 4, at - 1, at + 1, at + 4, n} & set(range(n + 1))
        return [replace(best, overrides=(f"--n-cpu-ffn {k}",) if k else ()) for k in sorted(near)]
    if flag in ("-ub", "-b"):
        return [replace(best, n_ubatch=k, n_batch=max(k, DEFAULT_BATCH)) for k in space.n_ubatch]
    if flag in ("-ctk", "-ctv"):
        types = dict.fromkeys((*space.kv_types, Type.F16, Type.Q8_0, Type.Q4_0))
        return [replace(best, type_k=t, type_v=t) for t in types]
    if flag == "-ts":
        return [replace(best, tensor_split=s) for s in space.tensor_split]
    if flag == "-t":
        return [replace(best, threads=k) for k in {1, max(host.n_cores // 2, 1), host.n_cores}]
    if flag == "--moe-cache-mib":
        return _best_of_sizes(maker, settings, best)
    if flag == "--moe-cache-misses":
        other = [replace(best, moe_cache_misses="cpu")] if best.moe_cache_mib else []
        return [*other, *([] if maker.advice.beyond is None else [maker.advice.beyond.setting])]
    if flag == "-ot":
        fit = maker.advice.fit
        return [] if fit is None or not fit.setting.overrides else [fit.setting]
    switched = {
        "--no-mmap": [replace(best, is_pinned=v) for v in space.is_pinned],
        "--no-op-offload": [replace(best, op_offload=v) for v in space.op_offload],
        "-nkvo": [replace(best, kv_offload=v) for v in space.kv_offload],
        "-fa": [replace(best, flash_attn=False)] if best.type_v is Type.F16 else [],
    }
    return switched.get(flag, [])


def _best_of_sizes(maker: Maker, settings: list[Setting], best: Setting) -> list[Setting]:
    """Return, for each size of the expert cache that has room, the setting that is fastest with it."""
    search, found = maker.search, dict[int, Setting]()
    alike = (s for s in settings if s.type_k is best.type_k)
    for scored in search.ranked(alike, lambda s: s.seconds):
        mib, taken = scored.setting.moe_cache_mib, search.memory.estimate(scored.setting)
        if mib not in found and taken is not None and all(d.fits for d in taken):
            found[mib] = scored.setting
    return [s for _, s in sorted(found.items())]


def _choice(maker: Maker, setting: Setting, best: Setting, flag: str) -> Choice:
    search = maker.search
    scored, taken = search.score(setting), search.memory.estimate(setting)
    if taken is None:
        taken = search.memory.exact(setting) or []
    fit = maker.advice.fit
    shown = "what --fit chooses" if flag == "-ot" and fit and setting == fit.setting else _shown(setting, flag)
    return Choice(
        shown, scored.prompt_s, scored.generate_s,
        sum(d.missing_bytes for d in taken), setting == best,
    )  # fmt: skip


def _shown(setting: Setting, flag: str) -> str:
    """Return the value of a flag in a setting, as flags say it."""
    shares = ",".join(f"{s:g}" for s in setting.tensor_split)
    shown = {
        "-ngl": f"-ngl {'all' if setting.n_gpu_layers < 0 else setting.n_gpu_layers}",
        "-ncmoe": f"-ncmoe {setting.n_cpu_moe}",
        "-ub": f"-ub {setting.n_ubatch}",
        "-b": f"-ub {setting.n_ubatch} -b {setting.n_batch}",
        "-ctk": f"-ctk {setting.type_k.ggml_name} -ctv {setting.type_v.ggml_name}",
        "-ts": f"-ts {shares}" if shares else "shares by memory",
        "-t": f"-t {setting.threads}",
        "-fa": f"-fa {'on' if setting.flash_attn else 'off'}",
        "-ncffn": f"-ncffn {_n_cpu_ffn(setting)}",
        "-ot": "the best plan's" if setting.overrides else "without -ot",
        "-nkvo": "KV cache on the device" if setting.kv_offload else "-nkvo",
        "--no-mmap": "--no-mmap" if setting.is_pinned else "--mmap",
        "--no-op-offload": "--op-offload" if setting.op_offload else "--no-op-offload",
        "--moe-cache-mib": f"-ncmoe {setting.n_cpu_moe} --moe-cache-mib {setting.moe_cache_mib}",
    }
    if setting.moe_cache_misses != "copy":
        shown["--moe-cache-misses"] = f"{shown['--moe-cache-mib']} --moe-cache-misses {setting.moe_cache_misses}"
    elif setting.moe_cache_mib:
        shown["--moe-cache-misses"] = shown["--moe-cache-mib"]
    else:
        shown["--moe-cache-misses"] = "no expert cache"
    return shown.get("-ctk" if flag == "-ctv" else flag, "")


def _n_cpu_ffn(setting: Setting) -> int:
    """Return the layers whose dense feed-forward weights are in host memory."""
    return sum(int(o.split()[1]) for o in setting.overrides if o.startswith("--n-cpu-ffn "))


def _words(flags: list[str]) -> list[str]:
    """Return flags with their values."""
    made: list[str] = []
    for word in flags:
        if word.startswith("-") or not made:
            made.append(word)
        else:
            made[-1] += f" {word}"
    return made


def _of_misses(maker: Maker, best: Recommendation) -> str:
    """Return what misses on the CPU would bring, which llama.cpp cannot do."""
    made = maker.advice.beyond
    if made is None:
        return "llama.cpp cannot do it, and it would not be faster than the best plan by 3 %."
    return (
        f"llama.cpp cannot do it. It would take {made.seconds:.1f} instead of {best.seconds:.1f} s, as `pyggml splits` shows. "
        f"{made.cache_line}"
    )


def _of_cache(maker: Maker, settings: list[Setting], best: Recommendation) -> str:
    """Return whether an expert cache pays, by carrying out the best one."""
    if best.setting.moe_cache_mib:
        without = next((p for p in maker.advice.plans if not p.setting.moe_cache_mib), None)
        ratio = f" The best plan without takes {without.seconds / best.seconds:.2f} times as long." if without else ""
        return f"It pays here. {best.cache_line}{ratio}"
    cached = [s for s in settings if s.moe_cache_mib and s.type_k is best.setting.type_k]
    found = next(maker.search.best(maker.search.ranked(cached, lambda s: s.seconds)), None)
    if found is None:
        return "No expert cache has room here, or nothing can be cached."
    made = maker.make(BEST, maker.search.filled(found))
    verdict = "It hardly pays here" if made.seconds < best.seconds else "It does not pay here"
    return (
        f"{verdict}: the best setting with a cache ({' '.join(w for w in _words(made.flags) if 'moe' in w)}) takes "
        f"{made.seconds / best.seconds:.2f} times as long as the best plan, {made.seconds:.1f} instead of {best.seconds:.1f} s. {made.cache_line}"
    )
