"""The Ray Serve application and its HTTP side. Touches no tensor.

what is deployed
    app.py                build(args: AppConfig) -> serve.Application; what the YAML names
    config.py             AppConfig: everything that `args:` may say
    plan.py               AppConfig + the cluster -> what to ask Ray for, or why it cannot work
    cluster.py            which processors the cluster's nodes have
    model_source.py       `model_path` -> a folder, or a Hub id
    launcher.py           `python -m deployments`: TinyChat's flags, and a drain at the end
    ingress.py            HAProxy in front of the replicas, where it is there
    preflight.py          what can be told to be wrong before Ray starts
    configuration_reference.py  AppConfig -> docs/configuration.md
    client.py             `python -m deployments.client`: ask from the terminal

a replica
    replica.py            ModelWorker on Ray, loading its engine at start
    model_worker.py       ModelWorker: engine + door + pictures -> the answers' records
    door.py               how many generations may be inside
    worker_request.py     a request's JSON -> WorkerRequest
    fields.py             fields of a request's JSON, checked by hand
    media.py              base64 -> pictures, within limits
    image_fetcher.py      pictures by URL, from hosts that are allowed
    pacing.py             the engine's deltas -> at most so many updates a second
    records.py            the protocol's records, and errors as records
    load_reporter.py      tells the link how much this replica holds
    start_up.py           what it says once it is ready

what can be seen of it
    metrics.py            the engine's figures as Ray metrics, under vLLM's names
    request_log.py        what there is to know about one request
    access_log.py         a JSON line for each request
    error_types.py        kinds of errors, by name

its HTTP
    http_app.py           the FastAPI application of a worker
    logged_app.py         requests' ids and the log, around all of it
    worker_api.py         the /worker_* routes of LLaVA and TinyChat
    fastchat_api.py       the routes that FastChat's workers have besides
    body.py               a request's body, within limits
    openai/               OpenAI's API, with and without HTTP
    vila_api.py           /chat/completions as VILA's own server has it
    playground/           the page at /

the controller
    controller_link.py    ControllerLink: registers the application, and sends heartbeats
    controller_client.py  the calls that a controller understands
    load_board.py         the load of all replicas together
"""
