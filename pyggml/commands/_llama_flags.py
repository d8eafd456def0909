"""Translation of llama.cpp's flags, so that users can paste command lines of llama-cli, llama-server and llama-bench.

There are four kinds of flags: options of the command with the same name, which `translate` does not change; options with
another name or other values; flags without effect on splits, copies, memory and time, which are named in a warning; and
flags that change the result and are not supported, which are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from functools import partial
from typing import TypeVar

import click

__all__ = ["WITHOUT_EFFECT", "Translated", "translate"]

_V = TypeVar("_V")


def _each(flags: str, value: _V) -> dict[str, _V]:
    """Return the same value for each flag of a text."""
    return dict.fromkeys(flags.split(), value)


#: Flags without effect here, and whether a value follows. Source: `common_params_parser_init` of b11434.
WITHOUT_EFFECT: dict[str, bool] = _each(
    """
    --verbose-prompt --display-prompt --no-display-prompt --cache-idle-slots --no-cache-idle-slots --context-shift
    --no-context-shift --perf --no-perf --show-timings --no-show-timings -e --escape --no-escape --prompt-cache-all
    --prompt-cache-ro -sp --special -cnv --conversation -no-cnv --no-conversation -st --single-turn -if
    --interactive-first -mli --multiline-input --in-prefix-bos --warmup --no-warmup --spm-infill -bs
    --backend-sampling --repack -nr --no-repack --no-host -cb --cont-batching -nocb --no-cont-batching --mmproj-auto
    --no-mmproj --no-mmproj-auto --mmproj-offload --no-mmproj-offload --mtp --dflash --eagle3 --reuse-port
    --cors-credentials --no-cors-credentials --ui-mcp-proxy --webui-mcp-proxy --no-ui-mcp-proxy --no-webui-mcp-proxy
    -ag --agent -no-ag --no-agent --ui --webui --no-ui --no-webui --embedding --embeddings --rerank --reranking
    --cache-prompt --no-cache-prompt --metrics --props --slots --no-slots --models-autoload --no-models-autoload
    --jinja --no-jinja --reasoning-preserve --no-reasoning-preserve --skip-chat-parsing --no-skip-chat-parsing
    --prefill-assistant --no-prefill-assistant --lora-init-without-apply --simple-io --log-disable --log-jsonl
    --no-log-jsonl -v --verbose --log-verbose --offline --log-prefix --no-log-prefix --log-timestamps
    --no-log-timestamps --spec-draft-cpu-moe -cmoed --cpu-moe-draft --spec-draft-backend-sampling
    --no-spec-draft-backend-sampling --spec-default --mlock --no-mlock
    --ignore-eos -i --interactive
    """,
    False,
) | _each(
    """
    --server-base -co --color -tb --threads-batch -C --cpu-mask -Cr --cpu-range --cpu-strict --prio --poll -Cb
    --cpu-mask-batch -Crb --cpu-range-batch --cpu-strict-batch --prio-batch --poll-batch -lcs --lookup-cache-static
    -lcd --lookup-cache-dynamic --kv-unified-per-slot --keep -ctxcp --ctx-checkpoints --swa-checkpoints -cms -cram
    --cache-ram -sysf --system-prompt-file --binary-file --print-token-count --prompt-cache -r --reverse-prompt
    --in-prefix --in-suffix --samplers --sampler-seq --sampling-seq --top-nsigma --top-n-sigma --xtc-probability
    --xtc-threshold --typical --typical-p --repeat-last-n --repeat-penalty --presence-penalty --frequency-penalty
    --dry-multiplier --dry-base --dry-allowed-length --dry-penalty-last-n --dry-sequence-breaker --adaptive-target
    --adaptive-decay --dynatemp-range --dynatemp-exp --mirostat --mirostat-lr --mirostat-ent -l --logit-bias --grammar
    --grammar-file -j --json-schema -jf --json-schema-file -dt --defrag-thold -ns --sequences -mmu --mmproj-url
    --mtmd-batch-max-tokens -lzm --lazy-mode --numa -fit --fit -fitp --fit-print -fitt --fit-target -fitc --fit-ctx -a
    --alias --tags -hft --hf-token --host --port --path --cors-origins --cors-methods --cors-headers --api-prefix
    --ui-config --webui-config --ui-config-file --webui-config-file --tools --tools-runtime --mcp-servers-config
    --mcp-servers-json --api-key --api-key-file --ssl-key-file --ssl-cert-file --chat-template-kwargs -to --timeout
    --sse-ping-interval --threads-http --cache-reuse --slot-save-path --media-path --models-dir --models-preset
    --models-max --reasoning-format -rea --reasoning --reasoning-effort --reasoning-budget --reasoning-budget-message
    --chat-template --chat-template-file -sps --slot-prompt-similarity --sleep-idle-seconds --log-file
    --log-prompts-dir --log-colors -lv --verbosity --log-verbosity --spec-draft-hf -hfd -hfrd --hf-repo-draft
    --spec-draft-threads -td --threads-draft --spec-draft-threads-batch -tbd --threads-batch-draft
    --spec-draft-cpu-mask -Cd --cpu-mask-draft --spec-draft-cpu-range -Crd --cpu-range-draft --spec-draft-cpu-strict
    --cpu-strict-draft --spec-draft-prio --prio-draft --spec-draft-poll --poll-draft --spec-draft-cpu-mask-batch -Cbd
    --cpu-mask-batch-draft --spec-draft-cpu-range-batch -Crbd --cpu-range-batch-draft --spec-draft-cpu-strict-batch
    --cpu-strict-batch-draft --spec-draft-prio-batch --prio-batch-draft --spec-draft-poll-batch --poll-batch-draft
    --spec-draft-type-k -ctkd --cache-type-k-draft --spec-draft-type-v -ctvd --cache-type-v-draft
    --spec-draft-override-tensor --override-tensor-draft -otd --spec-draft-n-cpu-moe --spec-draft-ncmoe -ncmoed
    --n-cpu-moe-draft --spec-draft-n-max --spec-draft-n-min --spec-synth-len --spec-synth-rates --spec-draft-p-split
    --draft-p-split --spec-draft-p-min --draft-p-min --spec-draft-sampling --spec-draft-device -devd --device-draft
    --spec-draft-ngl -ngld --gpu-layers-draft --n-gpu-layers-draft --spec-ngram-mod-n-min --spec-ngram-mod-n-max
    --spec-ngram-mod-n-match --spec-ngram-simple-size-n --spec-ngram-simple-size-m --spec-ngram-simple-min-hits
    --spec-ngram-map-k-size-n --spec-ngram-map-k-size-m --spec-ngram-map-k-min-hits --spec-ngram-map-k4v-size-n
    --spec-ngram-map-k4v-size-m --spec-ngram-map-k4v-min-hits --draft --draft-n --draft-max --draft-min --draft-n-min
    --spec-ngram-size-n --spec-ngram-size-m --spec-ngram-min-hits --spec-type -md --model-draft --spec-draft-model -mm
    --mmproj --temp --top-k --top-p --min-p --seed --system --prompt -p --n-predict -n
    """,
    True,
)
#: Flags that change what is computed, and why they are refused.
_REFUSED = _each(
    """
    --rope-scaling --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx --yarn-ext-factor --yarn-attn-factor
    --yarn-beta-slow --yarn-beta-fast --override-kv --lora --lora-scaled --control-vector --control-vector-scaled
    --control-vector-layer-range --pooling --attention -gan --grp-attn-n -gaw --grp-attn-w
    """,
    "it changes the result and is not supported",
) | {
    "--rpc": "name the servers as devices: --device rpc:HOST:PORT,cpu",
    **dict.fromkeys(
        ("-mu", "--model-url", "-dr", "--docker-repo"),
        "pyggml does not download models: give a file, or a name from `pyggml models`",
    ),
    **dict.fromkeys(
        ("-hff", "--hf-file"), "pyggml does not download models: give the quantisation as -hf USER/MODEL:QUANT"
    ),
    **dict.fromkeys(("-f", "--file"), "give the text with --prompt"),
}
#: Our word for theirs; a word of the command itself comes first.
_SAME = {
    "-nkvo": "--no-kv-offload", "-kvo": "--kv-offload", "-no-kvu": "--no-kv-unified", "-sys": "--system",
    "--system-prompt": "--system", "--predict": "--n-predict", "--temperature": "--temp", "-s": "--seed",
}  # fmt: skip
#: A draft model on Hugging Face, where the command counts one.
_DRAFT_ON_HUB = ("-hfd", "-hfrd", "--spec-draft-hf", "--hf-repo-draft")
#: What `-otd` takes instead of these flags.
_DRAFT_EXPERTS = _each("-cmoed --cpu-moe-draft --spec-draft-cpu-moe", "--cpu-moe") | _each(
    "-ncmoed --n-cpu-moe-draft --spec-draft-n-cpu-moe --spec-draft-ncmoe", "--n-cpu-moe"
)
_FLASH = {"1": "on", "true": "on", "enabled": "on", "0": "off", "false": "off", "disabled": "off", "-1": "auto"}
_LOAD_MODES = {"auto": "--mmap", "mmap": "--mmap", "mmap+mlock": "--mmap"} | dict.fromkeys(
    ("none", "mlock", "dio"), "--no-mmap"
)


class Translated:
    """A translated command line.

    Attributes
    ----------
    words : list of str
        The words for the command.
    ignored : list of str
        Flags without effect, with their values.
    models : list of str
        The values of ``-m`` and ``-hf``.
    sizes : list of str
        The batch sizes of llama-bench's ``-p`` and ``-n``.
    """

    def __init__(self) -> None:
        self.words: list[str] = []
        self.ignored: list[str] = []
        self.models: list[str] = []
        self.sizes: list[str] = []


def translate(args: Collection[str], own: Mapping[str, bool]) -> Translated:
    """Translate llama.cpp's flags into the command's options.

    Parameters
    ----------
    args : sequence of str
        The words that the user typed.
    own : mapping of str to bool
        The command's options, and whether each takes a value.

    Raises
    ------
    click.UsageError
        A flag is refused or unknown, or its value is missing.
    """
    found, rest = Translated(), list(args)
    prompts: list[str] = []
    answers: list[str] = []
    while rest:
        word = rest.pop(0)
        if word == "--":
            found.words += [word, *rest]
            break
        if not re.match(r"-[-a-zA-Z]", word):
            found.words.append(word)
            continue
        flag, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        take = partial(_value, flag, value if equals else None, rest)
        flag = flag if flag in own else _SAME.get(flag, flag)
        if flag in ("-fa", "--flash-attn") and flag in own:
            has_value = equals or (rest and re.fullmatch(r"on|off|auto|[01]|-1|true|false|enabled|disabled", rest[0]))
            given = take() if has_value else "on"  # older versions have it without a value
            found.words += [flag, ",".join(_FLASH.get(part, part) for part in given.split(","))]
        elif flag == "--host":  # of llama-server an address; here a machine
            given = take()
            if flag in own and not re.fullmatch(r"[\d.]+|localhost|.*::.*|.*\.sock", given):
                found.words += [flag, given]
            else:
                found.ignored.append(f"{flag} {given}")
        elif flag in own:
            found.words += [flag, take()] if own[flag] else [flag]
        elif flag in ("-p", "--prompt", "--n-prompt", "-n", "--n-predict", "--n-gen") and "--batches" in own:
            text = take()  # llama-bench's -p 512,2048 -n 128; of the others, a text and a number
            is_bench = re.fullmatch(r"\d+(,\d+)*", text) is not None
            if flag.startswith(("-p", "--p", "--n-prompt")) and is_bench:
                prompts += text.split(",")
            elif is_bench:
                answers.append(f"{flag} {text}")
            else:
                found.ignored.append(f"{flag} {text}")
        elif flag in ("-m", "--model"):
            found.models.append(take())
        elif flag in ("-hf", "-hfr", "--hf-repo"):
            found.models.append(f"hf:{take()}")
        elif flag in _DRAFT_ON_HUB and "-md" in own:
            found.words += ["-md", f"hf:{take()}"]
        elif flag in _DRAFT_EXPERTS and "-otd" in own:
            word = _DRAFT_EXPERTS[flag]
            if WITHOUT_EFFECT[flag]:
                word = f"{word} {(n := take())}"
                if not n.isdigit():
                    raise click.UsageError(f"{flag} {n}: give a number of layers")
            found.words += ["-otd", word]
        elif flag in ("-lm", "--load-mode"):
            mode = take()
            if mode not in _LOAD_MODES:
                raise click.UsageError(f"{flag} {mode}: the modes are {', '.join(_LOAD_MODES)}")
            found.words.append(_LOAD_MODES[mode])
        elif flag in _REFUSED:
            raise click.UsageError(f"{flag} of llama.cpp: {_REFUSED[flag]}")
        elif flag in WITHOUT_EFFECT:
            found.ignored.append(f"{flag} {take()}" if WITHOUT_EFFECT[flag] else flag)
        elif len(word) > 2 and word[1] != "-" and word[:2] in own and re.fullmatch(r"[\d.]+", word[2:]):
            found.words += [word[:2], word[2:]]  # -n8
        else:
            known = {*own, *WITHOUT_EFFECT, *_SAME, *_REFUSED, "--model", "--hf-repo", "--load-mode"}
            raise click.NoSuchOption(flag, possibilities=get_close_matches(flag, known, 3, 0.6))
    if prompts:
        found.sizes = [n for n in prompts if n != "0"] + ["1" for said in answers if re.search("[1-9]", said)]
    else:
        found.ignored += answers  # a -n alone is llama-cli's
    if found.sizes:
        found.words += ["--batches", ",".join(found.sizes)]
    found.words += found.models
    return found


def _value(flag: str, given: str | None, rest: list[str]) -> str:
    """Return the value after the equals sign, or else take the next word from the rest."""
    if given is not None:
        return given
    if not rest:
        raise click.UsageError(f"{flag}: its value is missing")
    return rest.pop(0)
