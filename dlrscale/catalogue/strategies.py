"""The table of strategies: one row each, in the order in which they are listed.

Adding a strategy is one row here and one file in attacks/, named after the value that the row brings to an axis.
"""

from __future__ import annotations

from dlrscale.catalogue.axes import Knob, Levers, Strategy, Trains

_LORA_KNOBS = (
    Knob(name="rank", default=8, low=1, high=65536, text="rank of the adapters"),
    Knob(name="alpha", default=16, low=1, high=65536, text="scale of the adapters, alpha / rank"),
    Knob(name="dropout", default=0.0, low=0.0, high=0.99, text="dropout on the adapters' input"),
)

# Of gradient methods that update by themselves.
_NO_STATES = "stages 1 and 2 cut gradients and optimizer states over ranks, and this method has none."
_FORWARD_ONLY = Levers(zero=0, activation_checkpointing="none", activation_storage="device", tiles=1, optimizer="none")
_FORWARD_ONLY_FIXED = ("activation_checkpointing", "activation_storage", "tiles", "optimizer")

ROWS: tuple[Strategy, ...] = (
    Strategy(
        name="full",
        idea="all parameters, AdamW, plain autograd: the reference for claim C1",
        source="reference",
        saved="all activations: N layers of K D + 4 sum(R) (gated) against D + 4 F per token, and the rest",
        cost="1 forward, 1 backward",
        levers=Levers(activation_checkpointing="none"),
    ),
    Strategy(
        name="full-offload",
        idea="full, with optimizer states and parameters offloaded to host memory",
        source="ZeRO-Offload, arXiv 2101.06840; ZeRO-Infinity, arXiv 2104.07857",
        saved="as full",
        cost="as full, and the copies between host and device",
        levers=Levers(zero=3, offload_optimizer=True, offload_param=True, activation_checkpointing="none"),
        fixed=("offload_optimizer",),
    ),
    Strategy(
        name="ckpt-layer",
        idea="full, with activation checkpointing per transformer layer: the stock attacker",
        source="Chen et al., arXiv 1604.06174",
        saved="each layer's input, D per token; one layer's activations at a time going backward",
        cost="2 forwards, 1 backward",
        fixed=("activation_checkpointing",),
        levers=Levers(activation_checkpointing="layer"),
    ),
    Strategy(
        name="ckpt-nested",
        idea="ckpt-layer, and inside each layer segments of a DLR-Net's blocks checkpointed once more",
        source="Chen et al., arXiv 1604.06174, within one module",
        saved="as ckpt-layer; inside a layer about 2 sqrt(K D (D + 4 R)) of a DLR-Net in place of K (D + 4 R) (gated)",
        cost="2 forwards, 3 of the DLR-Nets, 1 backward; on the base as ckpt-layer, whose MLP is one block",
        levers=Levers(activation_checkpointing="nested"),
        fixed=("activation_checkpointing",),
    ),
    Strategy(
        name="ckpt-offload",
        idea="ckpt-layer with the layer inputs kept in host memory, as stock trainers offload hidden states",
        source="ZeRO-Infinity, arXiv 2104.07857",
        saved="none of the layers' inputs; one layer's activations at a time going backward",
        cost="2 forwards, 1 backward, and D per token and layer copied to the host and back",
        levers=Levers(activation_checkpointing="layer", activation_storage="host"),
        fixed=("activation_checkpointing", "activation_storage"),
    ),
    Strategy(
        name="act-offload",
        idea="full, with all that the layers save moved to host memory and back",
        source="torch saved-tensor hooks; ZeRO-Infinity, arXiv 2104.07857",
        saved="none of the layers'; on the host all that full saves there",
        cost="1 forward, 1 backward, and all saved bytes copied to the host and back",
        levers=Levers(activation_checkpointing="none", activation_storage="host"),
        fixed=("activation_checkpointing", "activation_storage"),
    ),
    Strategy(
        name="act-int8",
        idea="full, with what the layers save kept in 8 bits with a scale per row; inexact",
        source="ActNN, arXiv 2104.14129",
        saved="1 byte per element and 4 per row in place of 2 or 4 per element; attention's products as they are",
        cost="1 forward, 1 backward, and the rounding both ways",
        levers=Levers(activation_checkpointing="none", activation_storage="int8"),
        fixed=("activation_checkpointing", "activation_storage"),
    ),
    Strategy(
        name="tile-tokens",
        idea="each MLP or DLR-Net runs forward and backward on one piece of the tokens after the other",
        source="ALST, arXiv 2506.13996; DeepSpeed's TiledMLP",
        saved="as ckpt-layer; inside a layer D + 1/T of what the MLP or DLR-Net saves",
        cost="2 forwards, 3 of the MLPs, 1 backward, in T times as many products",
        levers=Levers(tiles=8),
    ),
    Strategy(
        name="reverse",
        idea="keep only the rank-R codes of a DLR-Net and rebuild its stream by subtraction going backward",
        source="ours; RevNet, arXiv 1707.04585, as a relative",
        saved="as ckpt-layer; inside a layer 2 D + sum(R) of a DLR-Net, whatever K is; on the base as ckpt-layer",
        cost="2 forwards, 3 of the DLR-Nets, 1 backward",
        gradient="reverse",
        knobs=(
            Knob(
                name="anchor",
                default=0,
                low=0,
                high=65536,
                text="blocks from one exactly kept stream to the next; 0: none",
            ),
        ),
    ),
    Strategy(
        name="lora",
        idea="low-rank adapters on all linear maps, the DLR factors too; checkpointed per layer",
        source="Hu et al., arXiv 2106.09685",
        saved="as ckpt-layer",
        cost="2 forwards, 1 backward without most weight gradients",
        trainable="lora",
        trains=Trains(parts=frozenset(), adapted=frozenset({"attention", "mlp", "projection"})),
        knobs=_LORA_KNOBS,
    ),
    Strategy(
        name="lora-attn",
        idea="low-rank adapters on the attention only, DLR-Nets frozen; checkpointed per layer",
        source="Hu et al., arXiv 2106.09685",
        saved="as ckpt-layer; inside a layer a frozen DLR-Net saves 3 sum(R) (gated)",
        cost="2 forwards, 1 backward without most weight gradients",
        trainable="lora-attn",
        trains=Trains(parts=frozenset(), adapted=frozenset({"attention"})),
        knobs=_LORA_KNOBS,
    ),
    Strategy(
        name="flatten",
        idea="let every block read the same input, which makes each DLR-Net one ordinary MLP; then ckpt-layer",
        source="ours; FFN Fusion, arXiv 2503.18908, as a relative",
        saved="as ckpt-layer on the base model",
        cost="no training for the transform, then as ckpt-layer",
        transform="flatten",
    ),
    Strategy(
        name="mezo",
        idea="SGD along one random direction per step, from two forward passes; keeps nothing but the weights; inexact",
        source="MeZO, Malladi et al., arXiv 2305.17333; SPSA, Spall 1992",
        saved="nothing",
        cost="2 forwards, no backward, and 3 times as many random numbers as trained parameters",
        gradient="mezo",
        levers=_FORWARD_ONLY,
        fixed=_FORWARD_ONLY_FIXED,
        exact=False,
        stages=(0, 3),
        why_not=_NO_STATES,
        knobs=(
            Knob(
                name="eps",
                default=1e-3,
                low=1e-8,
                high=1.0,
                text="how far the weights are moved for the two passes",
                search=(1e-4, 1e-2),
                log=True,
            ),
        ),
    ),
    Strategy(
        name="mezo-lora",
        idea="mezo on low-rank adapters of all linear maps alone; inexact",
        source="MeZO, Malladi et al., arXiv 2305.17333; Hu et al., arXiv 2106.09685",
        saved="nothing",
        cost="2 forwards, no backward",
        trainable="lora",
        gradient="mezo",
        levers=_FORWARD_ONLY,
        fixed=_FORWARD_ONLY_FIXED,
        exact=False,
        stages=(0, 3),
        why_not=_NO_STATES,
    ),
    Strategy(
        name="lomo",
        idea="SGD that updates each weight inside backward as soon as its gradient is whole, and keeps no other",
        source="LOMO, Lv et al., arXiv 2306.09782",
        saved="as ckpt-layer; one parameter's gradient at a time",
        cost="2 forwards, 1 backward",
        gradient="lomo",
        levers=Levers(zero=0, optimizer="none"),
        fixed=("optimizer",),
        stages=(0, 3),
        why_not=_NO_STATES,
        knobs=(
            Knob(
                name="clip",
                default=0.0,
                low=0.0,
                high=1e6,
                text="largest absolute value of a gradient's element; 0: any",
            ),
        ),
    ),
)
