"""The Ray Serve application and its HTTP side. Touches no tensor.

what is deployed
    app.py                build(args: AppConfig) -> serve.Application; what the YAML names
    config.py             AppConfig: everything that `args:` may say
    plan.py               AppConfig + the cluster -> what to ask Ray for, or why it cannot work
    cluster.py            which processors the cluster's nodes have
    model_source.py       `model_path` -> a folder, or a Hub id
    launcher.py           `python -m deployments`: TinyChat's flags, and a drain at the end
    client.py             `python -m deployments.client`: ask from the terminal

a replica
    replica.py            ModelWorker on Ray, loading its engine at start
    model_worker.py       ModelWorker: engine + door + pictures -> the answers' records
    door.py               how many generations may be inside
    worker_request.py     a request's JSON -> WorkerRequest
    media.py              base64 -> pictures, within limits
    pacing.py             the engine's deltas -> at most so many updates a second
    records.py            the protocol's records, and errors as records
    load_reporter.py      tells the link how much this replica holds

its HTTP
    http_app.py           the FastAPI application of a worker
    worker_api.py         the /worker_* routes of LLaVA and TinyChat
    fastchat_api.py       the routes that FastChat's workers have besides
    body.py               a request's body, within limits
    openai_api.py         OpenAI's routes, and vLLM's beside them
    openai_response.py    generations as JSON or server-sent events; clients that leave
    openai_errors.py      errors in vLLM's form, with its statuses
    vila_api.py           /chat/completions as VILA's own server has it

OpenAI's API, without HTTP
    openai_service.py     bodies -> generations, tokens, models
    openai_request.py     a body, checked and completed
    openai_messages.py    `messages` -> a conversation and its pictures
    openai_sampling.py    sampling fields and forms -> SamplingParams
    openai_generation.py  one request's way through door, pictures, engine and pacing
    openai_answer.py      completions and chunks as OpenAI's clients take them
    merging.py            several answers' updates as one sequence
    image_fetcher.py      pictures by URL, from hosts that are allowed
    fields.py             fields of a request's JSON, checked by hand

the controller
    controller_link.py    ControllerLink: registers the application, and sends heartbeats
    controller_client.py  the calls that a controller understands
    load_board.py         the load of all replicas together
"""
