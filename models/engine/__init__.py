"""The inference engine: requests in, text out, many at a time.

engine.py         the thread that runs the loop, and the face that callers see
core.py           the loop's body, `step()`: schedule, run, sample, commit
scheduler.py      who computes how many tokens next; admission, chunking, preemption
block_pool.py     which KV blocks are free, cached or used, and by whom
runner.py         a scheduled batch -> logits
decode_graphs.py  the same for steps of single tokens on a GPU, by one launch
sampler.py        logits -> tokens
in_flight.py      a step whose tokens are not back yet, while the next one is computed
prompt_scores.py  logits -> how likely a prompt was, for those who ask
output_text.py    tokens -> text that is never taken back
outbox.py         texts on their way out, as often as each reader wants them
memory.py         what to do when a device's is full
allocator.py      memory that one step frees is kept for the next
"""
