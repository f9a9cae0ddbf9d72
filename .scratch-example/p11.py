exec(open(".scratch-example/p7.py").read().split("edit(\"benchmarks/measure.py\"")[0])
edit("docs/scale.md",
("the states between pieces (PaTH: heads for time)", "the states between pieces (PaTH: heads for time, or keys)"),
('''- PaTH takes no cache with `axis_name`, and its H must be a multiple of the devices.
''', '''- PaTH takes no cache with `axis_name`. Its heads need not be a multiple of the devices, but should be (below).
'''),
('''| `path_attention` | | | its arrays, once there and the outputs back | none |

(T is a device's number of tokens here.)''', '''| `path_attention`, H a multiple of P | | | its arrays, once there and the outputs back | none |
| `path_attention`, otherwise | the maps between its tokens | | keys and values `P - 1` times, with gates or segments 4 bytes more for each head and token | none, but other devices wait |

(T is a device's number of tokens here, P the number of devices.)'''),
('''- **PaTH** exchanges heads for time: each device computes `H / P` heads of whole rows and then has its tokens back. All
  devices have the same work, but each holds all tokens of its heads. The segment ids, integers, are gathered.
''', '''- **PaTH** exchanges heads for time where H is a multiple of P: each device computes `H / P` heads of whole rows and then
  has its tokens back. All devices have the same work, but each holds all tokens of its heads. The segment ids,
  integers, are gathered. If the heads are split, too, H is the number of key heads on one device.
- **PaTH with other numbers of heads** moves keys and values from device to device, to the right; what is left of a
  device's own tokens is then plain attention, in `"xla"` whatever the implementation. A device holds two devices' keys
  at a time. The last device has the most work, and the others wait: of P devices at most `P / (2 P - 1)` are at work.
'''),
('''says of these again. The other kernels run as they are on each device, and XLA makes M and N. No GPU has timed any of
this yet.
''', '''says of these again; those of `gsa` and `mesa_net` make theirs in the same way. Elsewhere kernels run as they are on
each device, and XLA makes M and N.

## Estimates

Nothing here was measured on several GPUs. The command for that is in [benchmarks](../benchmarks/README.md#several-gpus),
and this is arithmetic: B = 1, H = 16, K = V = 128, M = 64, bfloat16 and 131072 tokens on each device, forward and
backward. One H200 alone takes the first column's time (benchmarks/results; `mesa_net`: four times 32768 tokens;
`path_attention`: 4.1 times its forward pass). NVLink moves 450 GB/s in each direction by its data sheet.

| | alone, ms | each device receives, twice; 4 GPUs | 8 GPUs | time of that, 4 and 8 GPUs | extra operations | efficiency, 4 and 8 GPUs |
|---|---|---|---|---|---|---|
| `kda` | 17.6 | 6.3 MB | 14.7 MB | 0.03 and 0.07 ms | 2% | 97% and 97% |
| `gsa` | 14.5 | 3.2 MB | 7.4 MB | 0.01 and 0.03 ms | 2% | 97% and 97% |
| `mesa_net` | 15.2 | 6.3 MB | 14.7 MB | 0.03 and 0.07 ms | 2% | 97% and 97% |
| `log_linear_attention` | 8.4 | 3.1 MB | 7.3 MB | 0.01 and 0.03 ms | 1.5 and 2.1 ms | 84% and 79% |
| `path_attention` | 474 | 2.4 GB | 2.8 GB | 10.7 and 12.5 ms | none | 99% and 99% |

- P - 1 summaries are received in each pass, of the bytes in the table above. Two exchanges' latency is taken as 0.1 ms
  together.
- With one row and 16 heads the kernels already cut a sequence into about five pieces, and their first passes leave out
  the last; over devices they do not. That is the 2%.
- Log-linear attention's reads of other devices' states are taken as XLA's products at 400 TFLOP/s, backward twice
  forward. This is the least certain number of all, and the reason to measure first.
- PaTH's work on P devices is P times that of one with as many tokens as each has, as its sequence is P times longer.
  That is counted as work: 474 ms alone become 1.9 s on four devices and 3.8 s on eight.
- A model of 118 million parameters with FSDP gathers its matrices in bfloat16 twice and sums their gradients: 6 bytes for
  each parameter, 0.6 GB or 1.4 ms on eight GPUs, of a step of 129 ms (65536 tokens a GPU; results of 2026-11-22). What it
  keeps falls from 12 bytes a parameter to 1.5.
- Between hosts, at 50 GB/s for each GPU, all times of moving are nine times as long: at most 0.6 ms for states.
'''),
('''- On several hosts all of this is the same: call `jax.distributed.initialize()` first, and make the inputs with
  `jax.make_array_from_process_local_data`.
''', ''),
('''## Several processes

Start the same''', '''## Several processes

On several hosts all of the above is the same: call `jax.distributed.initialize()` in each process before anything else,
and make the inputs with `jax.make_array_from_process_local_data`. The example does it by itself. Start the same'''),
)
edit("docs/contract.md", ('''devices and an initial state. Later devices move no output of earlier ones, not by a bit. Devices exchange states, and
no array with a time axis is gathered but PaTH's segment ids: there devices exchange heads for time. T must be a
multiple of the devices. Arrays whose''', '''devices and an initial state. Later devices move no output of earlier ones, not by a bit. Devices exchange states, and
no array with a time axis is gathered but PaTH's segment ids: there devices exchange heads for time, or keys move from
device to device where these do not divide the heads. T must be a multiple of the devices. Arrays whose'''))
