"""What a run would need, before it runs.

In reading order:

    costs     operations and bytes of a step, from shapes
    capacity  how much memory a device has
    memory    what is kept, by kind
    hlo       what the text of a compiled program says of it
    account   what one program needs: compiled, or by a formula
    programs  every large program, lowered from shapes alone
    target    devices that are not here, to compile for
    report    `gspo-jax plan`
    layout    `gspo-jax plan --shardings`: where every array lives
    doctor    `gspo-jax doctor`: this installation, and what is wrong with it
"""
