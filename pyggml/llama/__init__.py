"""llama.cpp in a child process: the graph that it builds for a model, and where it would put everything.

pyggml builds the graphs of some families itself. Every other family that llama.cpp knows is *captured*: a child process
loads the real llama.cpp, opens the model's header without data, and gives it a device that is written in Python. The
device sees every graph whole. `CapturedSource` turns what the child reports into the graphs that a `Planner` splits.

===============  ===========================================================================================
`store`          what was captured, kept in files; `process` starts the child that answers what is not kept
`child`          the child: reads requests, answers them with `capture`
`capture`        one model and one context in llama.cpp, and the graphs that they make
`device`         the device in Python, and what is changed of llama.cpp's own CPU device
`library`        the functions of llama.cpp; `slots`: where this build keeps its interfaces
`source`         from answers to a `GraphSource`
===============  ===========================================================================================

Only `child`, `capture`, `device`, `library` and `slots` touch llama.cpp, and they run in the child: an assertion that
fails there costs the child its life, and the parent gets a `ModelError`.
"""
