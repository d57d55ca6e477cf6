"""What a replica says once it is ready."""

from __future__ import annotations

from deployments.start_up import start_up_lines

ENGINE = {
    "model": "llava-demo", "layout": "llava", "precision": "W4A16", "device": "cpu",
    "dtype": "bfloat16", "backend": "cpu_int4_bf16", "threads": "2", "context": "1024 tokens",
    "attention": "torch", "cuda_graphs": "none",
    "kv_cache": "8192 tokens, 32 MiB, 8.0 full contexts", "max_num_seqs": "8",
    "prefix_cache": "on", "image_cache": "256 MiB, 14563 pictures of one tile",
    "loaded_in": "0.3 s",
}  # fmt: skip


def test_what_is_served_where_on_what_and_with_how_much_room() -> None:
    lines = start_up_lines(
        "llava-demo-4bit-AWQ", ENGINE, address="http://127.0.0.1:21002/", max_waiting=64,
        access_log="/logs/access.jsonl", metrics="http://192.0.2.1:8080/metrics",
    )  # fmt: skip
    assert lines == [
        "llava-demo-4bit-AWQ is ready at http://127.0.0.1:21002/",
        "model: llava-demo (llava layout, W4A16), loaded in 0.3 s",
        "device: cpu (threads: 2), bfloat16, backend cpu_int4_bf16, attention torch",
        "KV cache: 8192 tokens, 32 MiB, 8.0 full contexts of 1024 tokens, prefix caching on; "
        "8 requests run, 64 wait",
        "picture cache: 256 MiB, 14563 pictures of one tile",
        "access log: /logs/access.jsonl",
        "metrics: http://192.0.2.1:8080/metrics",
    ]


def test_what_is_not_known_is_left_out() -> None:
    lines = start_up_lines(
        "m", {**ENGINE, "device": "NVIDIA H100", "cuda_graphs": "up to 64 sequences"}, address=None,
        max_waiting=64, access_log="off", metrics=None,
    )  # fmt: skip
    assert lines[0] == "m is ready"
    assert lines[2] == (
        "device: NVIDIA H100, bfloat16, backend cpu_int4_bf16, attention torch, "
        "CUDA graphs: up to 64 sequences"
    )
    assert lines[-1] == "access log: off"
