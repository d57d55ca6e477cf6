"""The inference engine: requests in, text out, many at a time.

engine.py         the thread that runs the loop, and the face that callers see
core.py           the loop's body, `step()`: schedule, run, sample, commit
scheduler.py      who computes how many tokens next; admission, chunking, preemption
block_pool.py     which KV blocks are free, cached or used, and by whom
runner.py         a scheduled batch -> logits
sampler.py        logits -> tokens
prompt_scores.py  logits -> how likely a prompt was, for those who ask
output_text.py    tokens -> text that is never taken back
allocator.py      memory that one step frees is kept for the next
"""
