from test_planner_plan import attack_plan, Live, prepare, loss_of, locked_config, STRATEGIES, states, itertools, torch, pytest
@pytest.mark.parametrize("depth", [0, 4])
def test_x(make_llama, depth):
  for width in (64,256):
    wide = {"hidden_size": width, "intermediate_size": width * 11 // 4, "num_hidden_layers": 3}
    for (vocabulary, dtype), trainable, checkpointing in itertools.product(
        ((512, torch.float32), (2048, torch.bfloat16)), ("norms", "last-k","head","ladder"), ("none", "layer")
    ):
        config = make_llama(**(wide | {"vocab_size": vocabulary, "max_position_embeddings": 128,"pad_token_id":2})).config.to_dict()
        config = locked_config(config, "gated", depth) if depth else config
        model = prepare(config, "sdpa", dtype, trainable, checkpointing)
        with Live([*model.parameters(), *model.buffers()]) as live:
            loss_of(model, 2, 128).backward()
        plan = attack_plan(config, STRATEGIES[trainable], dtype="fp32" if dtype == torch.float32 else "bf16",
                           checkpointing=checkpointing, micro_batch=2, seq_len=128, device="cpu")
        gradients = plan.states["gradients"]
        plan.__dict__["states"] = dict.fromkeys(plan.states, states.Term()) | {"gradients": gradients}
        planned = max(plan.needs.peaks[phase] for phase in (states.FORWARD, states.BACKWARD))
        off = planned / live.peak - 1
        print(f"D {width}, K {depth}, V {vocabulary}, {dtype}, {trainable}, {checkpointing}: {off:+.2%}", plan.needs.peak_phase, plan.needs.device_terms, live.peak)
