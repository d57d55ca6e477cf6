"""Side-by-side measurements, with their records; README.md says how to run them.

engine.py         the engine against transformers' generate
serving.py        HTTP against the engine (and against transformers); start-up and memory
bf16_divergence.py   how often an answer in bf16 differs in company from the same alone
structured.py     what answers cost whose form is given
gpu.py            what one GPU can tell, in parts (gpu_*.py) that run by themselves

load.py           the questions that are asked, and what is noted of the answers
arm.py            one way to have questions answered
piped_arm.py      a model in a process of its own, at the end of a pipe
engine_arm.py     that process, with `models.load_engine` in it
transformers_arm.py   that process, with transformers' generate in it
http_arm.py       a worker, over HTTP
worker.py         starts and stops a worker, and measures its memory
comparison.py     asks all arms in turns
goals.py          what must be reached
streams.py        questions about noise, asked of an engine all at once
stopwatch.py      seconds by a device's own clock
report.py         table, record and plot
machine.py        what it was measured on
"""
