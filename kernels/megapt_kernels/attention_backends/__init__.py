"""The back ends of `megapt_kernels.attention_dispatch`: a file each, with what it takes (`supports`) and how it
is called (`run`).

`case.py` says what a back end may ask about a call and about the machine; `known_wrong.py` lists the cases in which an
installed library is known to answer wrongly.
"""
