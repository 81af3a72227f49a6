using Vmm.Core.Errors;

namespace Vmm.Migration.Multifd;

/// <summary>The error for a source that has more or fewer multifd channels than this side expects.</summary>
internal static class ChannelCount
{
    /// <summary>Makes the error, which names both counts.</summary>
    /// <param name="opened">Channels that the source opened, as far as this side knows.</param>
    /// <param name="expected">Channels that this side expects; 0 with multifd off.</param>
    /// <param name="within">How long this side waited for more; null when the source may have opened more than this side knows.</param>
    internal static IncompatibleStateException Refusal(int opened, int expected, TimeSpan? within = null)
    {
        string what = $"{opened} multifd channel{(opened == 1 ? "" : "s")}";
        string source = within is { } time ? $"the source opened {what} within {time.TotalSeconds:0.#} s" : $"the source opened at least {what}";
        string here = expected == 0 ? "multifd is off here, which expects none" : $"{expected} are expected here";
        return new IncompatibleStateException($"{source}, {here}")
        {
            Section = "multifd", Expected = $"{expected}", Found = $"{opened}",
            Hint = expected == 0 || opened == 0 ? "switch capability multifd on or off on both sides" : $"set parameter multifd-channels to {expected} on the source",
        };
    }
}
