"""What a replica says once it is ready."""

from __future__ import annotations

from collections.abc import Mapping


def start_up_lines(
    model_name: str,
    engine: Mapping[str, str],
    *,
    address: str | None,
    max_waiting: int,
    access_log: str,
    metrics: str | None,
) -> list[str]:
    """
    Args:
        engine: see `Engine.description`.
        address: the application's, where it is known.
        access_log: where it goes.
        metrics: the address of Ray's exporter on this node, where it is known.
    """
    where = f" at {address}" if address else ""
    on_cpu = engine["device"] == "cpu"
    threads = f" (threads: {engine['threads']})" if on_cpu else ""
    graphs = "" if on_cpu else f", CUDA graphs: {engine['cuda_graphs']}"
    return [
        f"{model_name} is ready{where}",
        f"model: {engine['model']} ({engine['layout']} layout, {engine['precision']}), "
        f"loaded in {engine['loaded_in']}",
        f"device: {engine['device']}{threads}, {engine['dtype']}, backend {engine['backend']}, "
        f"attention {engine['attention']}{graphs}",
        f"KV cache: {engine['kv_cache']} of {engine['context']}, "
        f"prefix caching {engine['prefix_cache']}; {engine['max_num_seqs']} requests run, "
        f"{max_waiting} wait",
        f"picture cache: {engine['image_cache']}",
        f"access log: {access_log}",
        *([f"metrics: {metrics}"] if metrics else []),
    ]
