"""config.json with sizes, layers, positions and names that lie; each under three commands."""
import json

from common import packlib

SIZES = ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"]
ANY = {
    "rope0": {"rope_theta": 0},
    "ropeinf": {"rope_theta": 1e308},
    "eps": {"rms_norm_eps": 1e308},
    "eps-neg": {"rms_norm_eps": -1},
    "eos": {"eos_token_id": [2**32 - 1] * 100_000},
    "names": {"architectures": ["\x1b[2J\u202e"]},
    "window": {"sliding_window": 0, "use_sliding_window": True},
    "kinds": {"layer_types": ["\x1b"] * 4},
    "kinds-many": {"layer_types": ["full_attention"] * 1_000_000},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 1e308,
            "low_freq_factor": 0,
            "high_freq_factor": 0,
            "original_max_position_embeddings": 0,
        }
    },
}


def cases(bench):
    changes = {f"layers-{n}": ({"num_hidden_layers": n}, 1) for n in [0, 1, 3, 5, 2**31, 2**32 - 1, 2**32, 2**63]}
    changes |= {f"layers-{n}": ({"num_hidden_layers": n}, 1) for n in [-1, 1.5, "4", None]}
    changes |= {f"{key}-{n}": ({key: n}, 1) for key in SIZES for n in [0, 2**32 - 1, 2**63, -1]}
    positions = [0, 2**32 - 1, 2**63, -1]
    changes |= {f"positions-{n}": ({"max_position_embeddings": n}, None) for n in positions}
    changes |= {name: (change, None) for name, change in ANY.items()}
    changes["type"] = ({"model_type": "\x1b]0;x\x07"}, 1)

    def case(change, expected, command):
        def run(work):
            pack = work / "p.nf4pack"
            pack.write_bytes(packlib.with_file(bench.base, "config.json", json.dumps({**bench.config, **change})))
            more = {
                "generate": ["--prompt", "a", "--max-tokens", 1],
                "doctor": [],
                "eval": ["--data", bench.data, "--max-length", 32],
            }
            # doctor says what is wrong with a pack, and is not refused one.
            return bench.judge(bench.run([command, pack, *more[command]]), None if command == "doctor" else expected)

        return run

    commands = ["generate", "doctor", "eval"]
    return [
        (f"{name}/{command}", case(change, expected, command))
        for name, (change, expected) in changes.items()
        for command in commands
    ]
