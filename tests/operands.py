"""Where a program's kernels read their operands from: on a GPU XLA hands them parts of buffers."""

from jaxlib.mlir import ir


def parts_of_arrays(lowered, target="mosaic_gpu"):
    """The operands of a lowered program's kernels that are parts of other arrays: [(number of the
    call, number of the operand), ...].

    XLA makes no copy of a slice that is one piece of memory: it gives the kernel its address, which
    may be none that it can read, and prepares the launch anew each time.
    """
    calls, called, functions = [], {}, {}

    def visit(op):
        if op.name == "stablehlo.custom_call" and target in str(op.attributes["call_target_name"]):
            calls.append(op)
        elif op.name == "func.call":
            callee = ir.FlatSymbolRefAttr(op.attributes["callee"]).value
            called.setdefault(callee, []).append(op)
        elif op.name == "func.func":
            functions[ir.StringAttr(op.attributes["sym_name"]).value] = op
        for region in op.regions:
            for block in region:
                for inner in block:
                    visit(inner.operation)

    visit(lowered.compiler_ir("stablehlo").operation)

    def sources(value):
        """The operations that make a value, through reshapes and calls."""
        if isinstance(value.owner, ir.Block):
            parent = value.owner.owner.operation
            number = ir.BlockArgument(value).arg_number
            if parent.name != "func.func":
                if parent.name == "sdy.manual_computation":
                    yield from sources(parent.operands[number])
                return
            for call in called.get(ir.StringAttr(parent.attributes["sym_name"]).value, ()):
                yield from sources(call.operands[number])
            return
        op = value.owner.operation
        if op.name == "func.call":
            name = ir.FlatSymbolRefAttr(op.attributes["callee"]).value
            *_, last = functions[name].regions[0].blocks[0].operations
            yield from sources(last.operands[ir.OpResult(value).result_number])
        elif op.name in ("stablehlo.reshape", "stablehlo.optimization_barrier"):
            number = 0 if len(op.operands) == 1 else ir.OpResult(value).result_number
            yield from sources(op.operands[number])
        else:
            yield op

    return [
        (i, j)
        for i, call in enumerate(calls)
        for j, operand in enumerate(call.operands)
        if any(x.name in ("stablehlo.slice", "stablehlo.dynamic_slice") for x in sources(operand))
    ]
