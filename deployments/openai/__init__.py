"""OpenAI's API over the model worker.

HTTP
    api.py          the routes, and those that vLLM has beside them
    response.py     generations as JSON or server-sent events; clients that leave
    errors.py       errors in vLLM's form, with its statuses

without HTTP
    service.py      bodies -> generations, tokens, models
    request.py      a body, checked and completed
    messages.py     `messages` -> a conversation and its pictures
    sampling.py     sampling fields and forms -> SamplingParams
    generation.py   one request's way through door, pictures, engine and pacing
    merging.py      several answers' updates as one sequence
    answer.py       completions and chunks as OpenAI's clients take them
    prompt_logprobs.py, token_names.py   what answers say of tokens
"""
