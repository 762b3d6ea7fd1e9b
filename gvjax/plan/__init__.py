"""What fits before it costs money: every program of a run or study, compiled ahead of time for a named TPU or GPU.

    targets    what a name such as v5e-256 means: topology, usable memory, ceilings
    programs   what a recipe compiles, with the shapes it compiles it for, and what lies in memory beside it
    compiling  one program, compiled for devices that are not there: bytes, collectives, kernels
    hlo        what a compiled program says about its collectives
    fitting    whole plans, and the search for what would fit
    report     a plan as tables and as JSON
    command    `gvjax plan`: starts the process that compiles, and shows how far it is

Nothing here computes anything on a device, and none has to be there.
"""
