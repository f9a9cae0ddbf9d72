exec(open(".scratch-example/p7.py").read().split("edit(\"benchmarks/measure.py\"")[0])
edit("docs/scale.md",
('''(T is a device's number of tokens here, P the number of devices.) None of these bytes grows with T but PaTH's, whose work grows with T squared.
''', '''(T is a device's number of tokens here, P the number of devices.) None of these bytes grows with T but PaTH's, whose
work grows with T squared.
'''),
('''- **PaTH with other numbers of heads** moves keys and values from device to device, to the right; what is left of a
  device's own tokens is then plain attention, in `"xla"` whatever the implementation. A device holds two devices' keys
  at a time. The last device has the most work, and the others wait: of P devices at most `P / (2 P - 1)` are at work.
''', '''- **PaTH with other numbers of heads** moves keys and values from device to device, to the right, once more in the
  backward pass. The queries of a device read them with plain attention, by XLA whatever the implementation; a device
  holds two devices' keys at a time. The last device has the most work, and the others wait: `P / (2 P - 1)` of the
  devices' time is used. Split the heads, the rows, or time over fewer devices where you can.
'''),
('''KDA's kernels in `"pallas"` make M and N in their own pass over pieces ([kernels/](kernels/README.md)) and use what it
says of these again; those of `gsa` and `mesa_net` make theirs in the same way. Elsewhere kernels run as they are on
each device, and XLA makes M and N.
''', '''KDA's kernels make M and N in their own pass over pieces ([kernels/](kernels/README.md)) and use what it says of these
again, and so do those of `gsa` and `mesa_net` in `"pallas"`. Elsewhere kernels run as they are on each device, and XLA
makes M and N. With `axis_name` no kernel runs twice.
'''),
('''Nothing here was measured on several GPUs. The command for that is in [benchmarks](../benchmarks/README.md#several-gpus),
and this is arithmetic: B = 1, H = 16,''', '''No several GPUs have timed this yet; [benchmarks](../benchmarks/README.md#several-gpus) has the commands. What follows is
arithmetic: B = 1, H = 16,'''),
('''| | alone, ms | each device receives, twice; 4 GPUs | 8 GPUs | time of that, 4 and 8 GPUs | extra operations | efficiency, 4 and 8 GPUs |
|---|---|---|---|---|---|---|
| `kda` | 17.6 | 6.3 MB | 14.7 MB | 0.03 and 0.07 ms | 2% | 97% and 97% |
| `gsa` | 14.5 | 3.2 MB | 7.4 MB | 0.01 and 0.03 ms | 2% | 97% and 97% |
| `mesa_net` | 15.2 | 6.3 MB | 14.7 MB | 0.03 and 0.07 ms | 2% | 97% and 97% |
| `log_linear_attention` | 8.4 | 3.1 MB | 7.3 MB | 0.01 and 0.03 ms | 1.5 and 2.1 ms | 84% and 79% |
| `path_attention` | 474 | 2.4 GB | 2.8 GB | 10.7 and 12.5 ms | none | 99% and 99% |

- P - 1 summaries are received in each pass, of the bytes in the table above. Two exchanges' latency is taken as 0.1 ms
  together.
''', '''| estimates, 4 and 8 GPUs | alone, ms | a device receives, each pass | time of both passes | extra operations | efficiency |
|---|---|---|---|---|---|
| `kda` | 17.6 | 6.3 and 14.7 MB | 0.03 and 0.07 ms | 2% | 97% |
| `gsa` | 14.5 | 3.2 and 7.4 MB | 0.01 and 0.03 ms | 2% | 97% |
| `mesa_net` | 15.2 | 6.3 and 14.7 MB | 0.03 and 0.07 ms | 2% | 97% |
| `log_linear_attention` | 8.4 | 3.2 and 7.3 MB | 0.01 and 0.03 ms | 1.5 and 2.1 ms | 84 and 79% |
| `path_attention` | 474 | 2.4 and 2.8 GB | 10.7 and 12.5 ms | none | 99% |

- A device receives P - 1 times what the table above says that one sends. The latency of two exchanges is taken as 0.1
  ms together.
'''),
('''That is counted as work: 474 ms alone become 1.9 s on four devices and 3.8 s on eight.''', '''So 474 ms alone become 1.9 s on four devices and 3.8 s on eight, and the efficiency is of these.'''),
('''- Between hosts, at 50 GB/s for each GPU, all times of moving are nine times as long: at most 0.6 ms for states.
''', '''- Between hosts, at 50 GB/s for each GPU, moving takes nine times as long: at most 0.6 ms for states.
'''),
)
edit("benchmarks/README.md",
('''`ragged`, `packed`, `sweep`, `slots`, `grouped`); where none of a kind is named, all are meant. The small''', '''`ragged`, `packed`, `sweep`, `slots`, `grouped`); where none of a kind is named, all are meant. `context` is for
[several GPUs](#several-gpus), and never meant unless named. The small'''),
('''## The layers' kernels
''', '''## Several GPUs

    python -m benchmarks.run --what context --implementations pallas --out benchmarks/results/context_2.json
    python -m benchmarks.language_model --mixers kda,gsa --mesh data=2 --steps 20 --out benchmarks/results/mesh.json
    python -m benchmarks.language_model --mixers kda,gsa --mesh data=2 --replicated --steps 20 --out benchmarks/results/mesh.json
    python -m benchmarks.language_model --mixers kda --mesh data=2 --batch 32 --steps 10 --out benchmarks/results/mesh.json
    python -m benchmarks.language_model --mixers kda --mesh seq=2 --length 262144 --batch 1 --steps 10 --out benchmarks/results/mesh.json

These are for two GPUs; the last two have as many tokens on each. On four and eight the first command is the same, with
`context_4.json` and `context_8.json`, for it takes all GPUs that it sees (`CUDA_VISIBLE_DEVICES`). For the others:

| | FSDP, and with `--replicated` | as many tokens in windows | one sequence of 262144 |
|---|---|---|---|
| two GPUs | `--mesh data=2` | `--mesh data=2 --batch 32` | `--mesh seq=2 --length 262144 --batch 1` |
| four GPUs | `--mesh data=4` | `--mesh data=4` | `--mesh seq=4 --length 262144 --batch 1` |
| eight GPUs | `--mesh data=8` | `--mesh data=8 --batch 8` | `--mesh seq=8 --length 262144 --batch 1` |

`--mesh data=2,seq=2,model=2` and the like combine them. Without GPUs, `JAX_NUM_CPU_DEVICES=4 python -m benchmarks.run
--what context --shapes small --implementations xla` shows that all of it runs.

- **context** times `forward` and `backward` of every mechanism with 131072 tokens on each device, all of them one
  sequence, and on one device with as many tokens alone (`alone_ms`). `efficiency` is `work` times `alone_ms` by `ms`.
  `work` is 1; for PaTH it is the number of devices, as the work for each token grows with the sequence.
- **layer**, of `kda` alone, is forward and backward of `KimiDeltaAttention` (width 2048) over one sequence of 1,048,576
  tokens on all devices. Nothing inside of the layer is kept for the backward pass. `memory_gib` and `memory_peak_gib`
  are one device's.
- **--mesh** trains by the step of examples/train_lm.py `--mesh`, parameters and moments split over `data`, or whole on
  each device with `--replicated`. `--batch` is the number of windows for each of `data`'s devices.
- Rows have `mesh`, `devices` (or `gpus`) and `collectives`, which counts the compiled program's by name.
  [docs/scale.md](../docs/scale.md#estimates) estimates four and eight GPUs on paper.

## The layers' kernels
'''),
)
