"""PTX text -> Module / Kernel / Instr objects.  Only what NVVM-generated code needs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

TYPE_SIZE = {
    "pred": 1,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
}


class PtxSyntaxError(Exception):
    """Text that is no PTX, or PTX of a kind that is not read here."""


@dataclass
class Instr:
    """One instruction.

    Attributes
    ----------
    op : tuple of str
        The opcode split at its dots: ``("ld", "global", "f32")``.
    args : list of str
        Operands; those in brackets or braces kept whole.
    pred, neg : str or None, bool
        The guard register, and whether it is negated.
    line, loc : int, tuple
        Line in the PTX text; file id and line of the last ``.loc``.
    """

    op: tuple[str, ...]
    args: list[str]
    pred: str | None
    neg: bool
    line: int
    loc: tuple[int, int] | None
    text: str


@dataclass
class Label:
    """A place that branches go to."""

    name: str


@dataclass
class Var:
    """A variable in global, constant, shared or local memory."""

    name: str
    space: str
    align: int
    size: int
    init: bytes | None = None


@dataclass
class Param:
    """A parameter of a kernel."""

    name: str
    type: str
    size: int
    align: int


@dataclass
class Kernel:
    """An entry: parameters, registers by type, body, variables declared inside, and attributes such as ``maxntid``."""

    name: str
    params: list[Param]
    regs: dict[str, str]
    body: list[Instr | Label]
    vars: list[Var]
    attrs: dict[str, str]


@dataclass
class Module:
    """A PTX file."""

    version: str = ""
    target: str = ""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    vars: list[Var] = field(default_factory=list)
    files: dict[int, str] = field(default_factory=dict)


_comment = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_var = re.compile(
    r"\.(global|const|shared|local)\s+(?:\.align\s+(\d+)\s+)?(?:\.ptr\s+)?\.(\w+)\s+([\w$%.]+)\s*"
    r"((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.DOTALL,
)


def _strip(text: str) -> str:
    # blank out comments but keep newlines, so that line numbers survive
    return _comment.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)


def _parse_var(stmt: str) -> Var:
    s = re.sub(r"\.(visible|extern|common|weak|attribute\([^)]*\))\s*", "", stmt).strip()
    m = _var.match(s)
    if not m:
        raise PtxSyntaxError("variable: " + stmt[:120])
    space, align, ty, name, dims, init = m.groups()
    n = 1
    for d in re.findall(r"\[(\d*)\]", dims):
        n *= int(d or 0)
    size = n * TYPE_SIZE[ty]
    data = None
    if init:
        vals = [v.strip() for v in init.strip().strip("{}").split(",")]
        try:
            data = b"".join(
                (int(v, 0) & (1 << 8 * TYPE_SIZE[ty]) - 1).to_bytes(TYPE_SIZE[ty], "little") for v in vals if v
            )
        except ValueError:
            data = None  # a float or a symbol: left zero
    return Var(name, space, int(align or TYPE_SIZE[ty]), size, data)


def split_args(s: str) -> list[str]:
    """Split operands at the commas outside brackets."""
    out, depth, cur = [], 0, ""
    for ch in s:
        if ch in "[{(":
            depth += 1
        elif ch in "]})":
            depth -= 1
        if ch == "," and depth == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += ch
    if cur.strip():
        out.append(cur.strip())
    return out


def parse(text: str) -> Module:
    """Parse a PTX file.

    Raises
    ------
    PtxSyntaxError
        It could not be read.
    """
    src = _strip(text)
    mod = Module()
    for m in re.finditer(r"\.file\s+(\d+)\s+\"([^\"]*)\"", text):
        mod.files[int(m.group(1))] = m.group(2)
    version, target = re.search(r"\.version\s+([\d.]+)", src), re.search(r"\.target\s+(\w+)", src)
    mod.version = version.group(1) if version else ""
    mod.target = target.group(1) if target else ""
    pos, n = 0, len(src)
    head = re.compile(r"\s*(\.version[^\n]*|\.target[^\n]*|\.address_size[^\n]*|\.file[^\n]*|\.loc[^\n]*)")
    while pos < n:
        if line := head.match(src, pos):
            pos = line.end()
            continue
        while pos < n and src[pos].isspace():
            pos += 1
        if pos >= n:
            break
        if src.startswith(".section", pos):  # debug sections
            pos = _match_brace(src, src.index("{", pos)) + 1
            continue
        j = pos
        while j < n and src[j] not in ";{":
            j += 1
        chunk = src[pos:j]
        if re.search(r"\.(entry|func)\b", chunk):
            if j < n and src[j] == "{":
                end = _match_brace(src, j)
                if ".entry" in chunk:
                    k = _parse_kernel(chunk, src[j + 1 : end], src.count("\n", 0, j) + 1)
                    mod.kernels[k.name] = k
                pos = end + 1
            else:
                pos = j + 1  # a forward declaration
            continue
        if j < n and src[j] == "{":  # initialised array
            j = src.index(";", _match_brace(src, j))
            chunk = src[pos:j]
        if re.search(r"\.(global|const|shared)\b", chunk):
            mod.vars.append(_parse_var(chunk))
        pos = j + 1
    return mod


def _match_brace(s: str, i: int) -> int:
    depth = 0
    for j in range(i, len(s)):
        if s[j] == "{":
            depth += 1
        elif s[j] == "}":
            depth -= 1
            if depth == 0:
                return j
    raise PtxSyntaxError("unbalanced braces")


def _parse_kernel(head: str, body: str, line0: int) -> Kernel:
    m = re.search(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^)]*)$", head, re.DOTALL)
    if m is None:
        raise PtxSyntaxError(f"line {line0}: {head[:120]}")
    name, plist, tail = m.groups()
    params = []
    for p in split_args(plist or ""):
        pm = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?"
            r"([\w$]+)\s*(?:\[(\d+)\])?",
            p,
        )
        if pm is None:
            raise PtxSyntaxError(f"line {line0}: parameter {p[:120]}")
        al, ty, pn, cnt = pm.groups()
        size = TYPE_SIZE[ty] * int(cnt or 1)
        params.append(Param(pn, ty if cnt is None else "bytes", size, int(al or TYPE_SIZE[ty])))
    attrs = {a: v for a, v in re.findall(r"\.(maxntid|reqntid|minnctapersm|maxnreg)\s+([\d, ]+)", tail or "")}
    k = Kernel(name, params, {}, [], [], attrs)
    scopes: list[dict[str, str]] = [{}]
    uid = 0
    loc: tuple[int, int] | None = None

    def rename(s: str) -> str:
        def sub(mm: re.Match[str]) -> str:
            w = mm.group()
            for sc in reversed(scopes):
                if w in sc:
                    return sc[w]
            return w

        return re.sub(r"%?[A-Za-z_$][\w$]*", sub, s) if len(scopes) > 1 else s

    def statement(st: str, line: int) -> None:
        nonlocal uid, loc
        st = st.strip()
        if not st:
            return
        m = re.match(r"\.reg\s+\.(\w+)\s+(.*)", st, re.DOTALL)
        if m:
            for nm in m.group(2).split(","):
                nm = nm.strip()
                g = re.match(r"(%?[\w$]+)<(\d+)>", nm)
                names = [f"{g.group(1)}{i}" for i in range(int(g.group(2)))] if g else [nm]
                for x in names:
                    y = x
                    if len(scopes) > 1:
                        uid += 1
                        y = f"{x}__s{uid}"
                        scopes[-1][x] = y
                    k.regs[y] = m.group(1)
            return
        if re.match(r"\.(shared|local|global|const)\b", st):
            k.vars.append(_parse_var(st))
            return
        if st.startswith(".loc"):
            f = st.split()
            loc = (int(f[1]), int(f[2]))
            return
        if st.startswith("."):
            return  # .pragma and friends
        pred, neg = None, False
        m = re.match(r"@(!?)\s*([%\w$]+)\s+(.*)", st, re.DOTALL)
        if m:
            neg, pred, st2 = bool(m.group(1)), rename(m.group(2)), m.group(3)
        else:
            st2 = st
        m = re.match(r"([a-z_][\w.:]*)\s*(.*)", st2, re.DOTALL)
        if not m:
            raise PtxSyntaxError(f"line {line}: {st}")
        op = tuple(m.group(1).replace("::", "-").split("."))
        args = [rename(a) for a in split_args(m.group(2))] if op[0] != "bra" else split_args(m.group(2))
        k.body.append(Instr(op, args, pred, neg, line, loc, " ".join(st.split())))

    i, line, cur, cl = 0, line0, "", line0
    depth_op = 0  # inside an operand's { }
    while i < len(body):
        ch = body[i]
        if ch == "\n":
            line += 1
            if cur.strip().startswith(".loc") or (cur.strip().startswith(".pragma") and cur.strip().endswith(";")):
                statement(cur.strip(), cl)
                cur = ""
        if ch == "{" and not cur.strip():
            scopes.append({})
            i += 1
            continue
        if ch == "}" and not cur.strip() and depth_op == 0:
            scopes.pop()
            i += 1
            continue
        if ch == "{":
            depth_op += 1
        if ch == "}":
            depth_op -= 1
        if ch == ";" and depth_op == 0:
            statement(cur, cl)
            cur = ""
        elif ch == ":" and re.fullmatch(r"\s*[\w$%]+", cur) and body[i + 1 : i + 2] != ":":
            k.body.append(Label(cur.strip()))
            cur = ""
        else:
            if not cur.strip() and not ch.isspace():
                cl = line
            cur += ch
        i += 1
    return k
