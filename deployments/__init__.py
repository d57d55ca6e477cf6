"""The Ray Serve application and its HTTP side. Touches no tensor.

app.py            build(args: AppConfig) -> serve.Application; what serve_config.yaml names
config.py         AppConfig: everything that `args:` may say
plan.py           AppConfig + the cluster -> what to ask Ray for, or why it cannot work
cluster.py        which processors the cluster's nodes have
model_source.py   `model_path` -> a folder, or a Hub id
replica.py        ModelReplica: ModelWorker on Ray, loading its engine at start
model_worker.py   ModelWorker: engine + door + pictures -> the answers' records
door.py           how many generations may be inside
worker_request.py a request's JSON -> WorkerRequest
media.py          base64 -> pictures, within limits
pacing.py         the engine's deltas -> at most so many updates a second
records.py        the protocol's records, and errors as records
http_app.py       the FastAPI application of a worker
worker_api.py     the /worker_* routes
body.py           a request's body, within limits
client.py         `python -m deployments.client`: ask from the terminal
"""
