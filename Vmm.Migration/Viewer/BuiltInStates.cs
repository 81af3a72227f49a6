namespace Vmm.Migration.Viewer;

/// <summary>
/// The layouts of the two sections that every machine has, for streams without VMDESC, e.g. of postcopy, and for packages (stream 10.1, 10.2).
/// </summary>
internal static class BuiltInStates
{
    /// <summary>Returns the layout of a section, or null if it is neither of the two.</summary>
    internal static DescribedState? Find(string idStr, uint version) => (idStr, version) switch
    {
        ("timer", 1) => Timer(1),
        ("timer", 2) => Timer(2),
        ("globalstate", 1) => State("globalstate", 1, ("size", "uint32", 4), ("runstate", "buffer", 32), ("has_vm_was_suspended", "uint8", 1),
            ("vm_was_suspended", "uint8", 1), ("unused", "unused_buffer", 66)),
        _ => null,
    };

    private static DescribedState Timer(int version)
    {
        DescribedState state = State("timer", version, ("cpu_ticks_offset", "int64", 8), ("unused", "unused_buffer", 8));
        if (version > 1) state.Fields.Add(new DescribedField { Name = "cpu_clock_offset", Type = "int64", Size = 8 });
        return state;
    }

    private static DescribedState State(string name, int version, params (string Name, string Type, int Size)[] fields)
    {
        var state = new DescribedState { Name = name, Version = version };
        foreach ((string field, string type, int size) in fields) state.Fields.Add(new DescribedField { Name = field, Type = type, Size = size });
        return state;
    }
}
