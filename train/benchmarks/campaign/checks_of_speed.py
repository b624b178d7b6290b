"""Parts 2 and 3 of the campaign: the speed and memory of 124M and 1.3B parameters."""

from train.benchmarks.campaign.figures import (
    GENERATE,
    GENERATED,
    OURS,
    SIZES,
    at,
    bench_step,
    first_ratio,
    probe,
    real_steps,
    speed,
    tiny_probe,
    tiny_step,
    variant_ratio,
)
from train.benchmarks.campaign.running import Check, Figure

ELSEWHERE = "on a CPU the same command as another check"
# With the head's loss in one kernel a chunk; before that 366K and 55K tokens a second were reckoned.
H100_124M, H100_1P3B = {"tokens": 446e3, "mfu": 0.39}, {"tokens": 56.6e3, "mfu": 0.515}
VS_NANOGPT = 446 / 471  # in thousands of tokens a second; nanoGPT's is a plain model that is compiled as a whole
CUT_BLOCKS = 0.97  # a share of the tokens a second
HELLASWAG = ("eval/benchmarks/bench_hellaswag.py", "--json={json}")
DDP = (
    Figure("share of the speed without DDP", variant_ratio("buckets of 100 MiB", "no DDP"), 0.99),
    Figure("share with buckets of 25 MiB", variant_ratio("buckets of 25 MiB", "no DDP")),
    Figure("share with blocks cut", variant_ratio("blocks cut by DDPOptimizer", "no DDP"), CUT_BLOCKS),
)


def large_step(kind: str, *options: str) -> tuple[str, ...]:
    """Of 1.3B parameters, for each micro-batch. One turn, as a step takes a second."""
    return bench_step(f"--preset={kind}-1p3b", *OURS, "--turns=1", "--micro-batch", *options)


PROFILED = ("--eval.every_steps=0", "--eval.tokens=65536", "--traces={out}")
SMOKE_STEPS = ("--config=train/configs/smoke.yaml", "--run.max_steps=6", "--profile.first=5", "--profile.steps=2")
SMALL = (
    Check(
        "steps-124m", 2, 75,
        probe(
            "steps", "--name=steps-124m", "--config=train/configs/gpt2-124m.yaml", "--run.max_steps=12",
            "--profile.first=11", "--profile.steps=2", *PROFILED,
        ),
        "12 steps of a real run of 0.5M tokens each: as fast and as large as reckoned; the last two profiled",
        real_steps(
            H100_124M, head=0.26, matrix_products=0.38, elementwise=0.25, attention=0.09, optimizer=0.01, idle=0.01
        ),
        tiny_probe("steps", "--name=steps-124m", *SMOKE_STEPS),
    ),
    Check(
        "micro-batches-124m", 2, 80, bench_step("--preset=gpt2-124m", "--micro-batch", "16", "32", "64", "128", *OURS),
        "the speed hardly depends on the micro-batch, and the memory is as estimated",
        speed(H100_124M["tokens"], H100_124M["mfu"]), tiny_step("longhaul"),
    ),
    Check(
        "contest-124m", 2, 90, bench_step("--preset=gpt2-124m", "--micro-batch", "32"),
        "beside a textbook's step, nanoGPT's and transformers', in turns",
        (
            Figure("times nanoGPT's tokens per second", first_ratio("tokens_per_second_vs_nanogpt"), VS_NANOGPT),
            Figure("times the textbook's", first_ratio("tokens_per_second_vs_textbook")),
            Figure("times transformers'", first_ratio("tokens_per_second_vs_transformers")),
            Figure("share of the ceiling", first_ratio("share_of_ceiling"), 0.45),
        ),
        tiny_step("longhaul", "textbook"),
    ),
    Check(
        "heads", 2, 40, probe("heads"), "what the head costs, in microseconds a token, and what other ways to it would",
        (
            Figure("longhaul", at("longhaul", "microseconds_per_token"), 0.58),
            Figure("longhaul, eager", at("longhaul, eager", "microseconds_per_token"), 1.08),
            Figure("plain, compiled", at("plain, compiled", "microseconds_per_token"), 0.55),
            Figure("gradients' distance from plain", at("longhaul", "difference"), 0.0, most=0.02),
        ),
        tiny_probe("heads"),
    ),
    Check(
        "attentions", 2, 30, probe("attentions"), "which of torch's attentions is the fastest, in microseconds a token",
        (
            Figure("flash, 124M, a layer", at("124m", "flash", "microseconds_per_token"), 0.20 / 12),
            Figure("cuDNN's, 124M, a layer", at("124m", "cudnn", "microseconds_per_token"), 0.20 / 12),
            Figure("flash, 1.3B, a layer", at("1p3b", "flash", "microseconds_per_token"), 1.64 / 24),
            Figure("cuDNN's, 1.3B, a layer", at("1p3b", "cudnn", "microseconds_per_token"), 1.64 / 24),
        ),
        tiny_probe("attentions"),
    ),
    Check(
        "ddp-124m", 2, 60, probe("ddp", "--config=train/configs/gpt2-124m.yaml", "--micro-batch=32"),
        "DDP's wrapper, buckets and hooks around one rank cost little, cut blocks more",
        DDP,
        tiny_probe("ddp", *SIZES, "--model.block_size=32", "--run.dtype=fp32", "--run.compile=false"),
    ),
    Check(
        "eager-124m", 2, 20, bench_step("--preset=gpt2-124m", "--micro-batch", "64", "--compile=false", *OURS),
        "what compiling wins", speed(), ELSEWHERE,
    ),
    Check(
        "fp16-124m", 2, 25, bench_step("--preset=gpt2-124m", "--micro-batch", "16", "--dtype=fp16", *OURS),
        "fp16, for older cards", speed(), ELSEWHERE,
    ),
    Check(
        "stream-124m", 2, 20,
        bench_step("--preset=gpt2-124m", "--micro-batch", "32", "--dtype=bf16", "--run.stream_dtype=bf16", *OURS),
        "a residual stream in bf16", speed(476e3), ELSEWHERE,
    ),
    Check(
        "tf32-124m", 2, 25, bench_step("--preset=gpt2-124m", "--micro-batch", "16", "--dtype=fp32", *OURS),
        "float32 with TensorFloat-32", speed(), ELSEWHERE,
    ),
    Check(
        "window-124m", 2, 30, bench_step("--preset=gpt2-124m", "--micro-batch", "32", "--window=256", *OURS),
        "a window by FlexAttention", speed(), ELSEWHERE,
    ),
    Check(
        "documents-124m", 2, 30, bench_step("--preset=gpt2-124m", "--micro-batch", "32", "--documents", *OURS),
        "documents kept apart by FlexAttention", speed(), ELSEWHERE,
    ),
)  # fmt: skip

LARGE = (
    Check(
        "steps-1p3b", 3, 140,
        probe(
            "steps", "--name=steps-1p3b", "--config=train/configs/gpt2-1p3b.yaml", "--run.max_steps=3",
            "--batch.tokens_per_step=1048576", "--checkpoint.every_steps=2", "--checkpoint.keep_last=1",
            "--profile.first=3", "--profile.steps=1", *PROFILED,
        ),
        "3 steps of a real run of 1M tokens each, two saves of 15.8 GB among them; the last step profiled",
        (
            *real_steps(H100_1P3B, head=0.06, matrix_products=0.64, elementwise=0.20, attention=0.09, idle=0.01),
            Figure("bytes of a save", lambda result: result["saves"][0]["save_bytes"], 15.8e9),
            Figure("seconds waited for the first save", lambda result: result["saves"][0]["save_blocked_seconds"]),
            Figure("seconds until it was written", lambda result: result["saves"][0]["save_seconds"]),
        ),
        tiny_probe("steps", "--name=steps-1p3b", *SMOKE_STEPS, "--checkpoint.every_steps=3"),
    ),
    Check(
        "micro-batches-1p3b", 3, 80, large_step("gpt2", "4", "8", "--recompute=none"),
        "micro-batch 8 without recomputing is the fastest that fits", speed(H100_1P3B["tokens"], H100_1P3B["mfu"]),
        ELSEWHERE,
    ),
    Check(
        "recompute-1p3b", 3, 40, large_step("gpt2", "16", "--recompute=full"),
        "what recomputing every block costs: about a quarter", speed(), ELSEWHERE,
    ),
    Check(
        "norms-1p3b", 3, 40, large_step("gpt2", "16", "--recompute=none", "--recompute.norms=true"),
        "recomputed norms let a larger micro-batch in", speed(), ELSEWHERE,
    ),
    Check(
        "llama-1p3b", 3, 40, large_step("llama", "8", "--recompute=none"),
        "the same size of Llama's kind", speed(), ELSEWHERE,
    ),
    Check(
        "buckets-1p3b", 3, 60,
        probe("ddp", "--config=train/configs/gpt2-1p3b.yaml", "--model.n_layer=8", "--micro-batch=8"),
        "buckets of 100 MiB and whole blocks against 25 MiB and cut blocks, of a third of the blocks", DDP, ELSEWHERE,
    ),
    Check(
        "perplexity", 3, 30,
        ("eval/perplexity.py", "{work}/runs/steps-1p3b", "--data={data}", "--tokens=262144", "--json={json}"),
        "a checkpoint that the GPU wrote is read and measured there", (Figure("loss", at("loss", "value")),),
        ("eval/perplexity.py", "{work}/runs/steps-1p3b", "--data={data}", "--tokens=512", "--json={json}"),
    ),
    Check(
        "generation", 3, 45,
        (*GENERATE, "--preset=gpt2-1p3b", "--device=cuda", "--dtype=bf16", "--batch", "1", "16", "--turns=2"),
        "texts at once and one by one, beside transformers", GENERATED,
        (
            *GENERATE, "--run={work}/runs/steps-1p3b", "--device=cpu", "--dtype=fp32", "--batch", "2", "--turns=1",
            "--prompt-tokens=8", "--tokens=4",
        ),
    ),
    Check(
        "hellaswag", 3, 45,
        (*HELLASWAG, "--preset=gpt2-1p3b", "--device=cuda", "--dtype=bf16", "--limit=500", "--turns=1"),
        "questions of many lengths, beside one at a time", (
            Figure("examples per second", at("examples_per_second", "longhaul")),
            Figure("times as fast as one at a time", at("times_faster")),
            Figure("share of the same answers", at("same_predictions"), 1.0, least=0.97),
        ),
        (*HELLASWAG, "--run={work}/runs/steps-1p3b", "--device=cpu", "--dtype=fp32", "--limit=4", "--turns=1"),
    ),
)  # fmt: skip
