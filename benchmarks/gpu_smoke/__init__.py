"""What only a GPU can show, in two parts; ``bash run_scripts/gpu_smoke.sh`` runs them.

`benchmarks.gpu_smoke.engine`: the packed passes of the engine, without vLLM. `benchmarks.gpu_smoke.loop`: whole
training runs. Nothing is downloaded.
"""
