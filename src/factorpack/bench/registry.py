"""The peers: what they are called, what they need, and the handful of settings that each is measured at."""

from dataclasses import dataclass

from factorpack.errors import UnsupportedError


@dataclass(frozen=True)
class Peer:
    """A way to make a network smaller: `script` of this package's peers, told `prefix` + a setting.

    `knob` says what the settings are; `calibrated` whether it is given the task's calibration data.
    """

    name: str
    title: str
    knob: str
    settings: tuple[str, ...]
    script: str
    requirements: tuple[str, ...] = ()
    calibrated: bool = False
    prefix: str = ""


RATIOS = ("5", "7", "10", "14", "20", "28")
ONNX = (
    "onnxruntime==1.32.0", "onnx==1.23.2", "onnxscript==0.7.2", "onnx_ir==1.1.0", "ml_dtypes==0.6.0",
    "protobuf==7.36.2", "flatbuffers==25.12.19",
)  # fmt: skip
PEERS = {
    peer.name: peer
    for peer in (
        Peer("factorpack", "Factorpack", "times smaller", RATIOS, "factorpack", calibrated=True, prefix="auto/"),
        Peer(
            "nncodec", "NNCodec 2.1.3", "qp", ("-44", "-40", "-36", "-32", "-28", "-24", "-20"), "nncodec",
            ("nncodec==2.1.3",),
        ),
        Peer(
            "uniform", "uniform rounding + range coder", "step in deviations",
            ("0.03", "0.06", "0.1", "0.17", "0.3", "0.5"), "uniform", ("constriction==0.5.0",),
        ),
        Peer(
            "palette", "k-means palettes", "bits", ("6", "4", "3", "2"), "palette",
            ("scikit-learn==1.9.1", "scipy==1.17.1", "joblib==1.6.0", "threadpoolctl==3.8.0"),
        ),
        Peer("float16", "float16 + zstd", "dtype", ("float16", "bfloat16"), "float16", ("zstandard==0.25.0",)),
        Peer("torchao", "torchao 0.18.0", "weights", ("int8", "int4", "int4x32"), "torchao", ("torchao==0.18.0",)),
        Peer(
            "quanto", "optimum-quanto 0.2.7", "weights", ("int8", "int4", "int2"), "quanto",
            ("optimum-quanto==0.2.7", "ninja==1.13.2"),
        ),
        Peer(
            "hqq", "HQQ 0.2.8.post1", "bits x group", ("8x64", "4x64", "3x64", "2x16"), "hqq",
            ("hqq==0.2.8.post1", "einops==0.8.2", "termcolor==3.3.0"),
        ),
        Peer(
            "nncf", "NNCF 3.4.0", "mode", ("int8", "int4x64", "int4x32"), "nncf",
            ("nncf==3.4.0", "ninja==1.13.2", "openvino-telemetry==2025.2.0", "pydot==4.0.1", "tabulate==0.10.0"),
            calibrated=True,
        ),
        Peer("onnx", "ONNX Runtime 1.32.0, dynamic int8", "weights", ("tensor", "channel"), "onnx", ONNX),
        Peer(
            "factorpack-sparse_pca", "Factorpack, form sparse_pca", "times smaller", ("7", "14"), "factorpack",
            calibrated=True, prefix="sparse_pca/",
        ),
        Peer(
            "factorpack-svd", "Factorpack, form svd", "times smaller", ("7", "14"), "factorpack",
            calibrated=True, prefix="svd/",
        ),
        Peer(
            "factorpack-vq", "Factorpack, form vq", "times smaller", ("10", "20"), "factorpack",
            calibrated=True, prefix="vq/",
        ),
    )
}  # fmt: skip
WRAPPER = ("zstandard==0.25.0",)
"""What compresses every file once more, without loss."""


@dataclass(frozen=True)
class Run:
    """A peer at one setting."""

    peer: Peer
    setting: str

    @property
    def name(self) -> str:
        """As `--peers` takes it."""
        return f"{self.peer.name}:{self.setting}"


def parse_peers(text: str) -> list[Run]:
    """Runs of a list such as "nncodec,palette:4,factorpack:12"; "all" stands for every peer at all its settings.

    Raises UnsupportedError for a peer that is not there.
    """
    runs = []
    for part in text.split(","):
        name, _, setting = part.strip().partition(":")
        if name != "all" and name not in PEERS:
            raise UnsupportedError(f"there is no peer {name!r}: choose of all, {', '.join(PEERS)}")
        if name == "all" and setting:
            raise UnsupportedError(f"{part.strip()}: a setting is one of a peer, such as nncodec:-24")
        for peer in PEERS.values() if name == "all" else [PEERS[name]]:
            runs += [Run(peer, chosen) for chosen in ([setting] if setting else peer.settings)]
    return list(dict.fromkeys(runs))
