using Vmm.Core.Errors;

namespace Vmm.Migration.Multifd;

/// <summary>The refusal of a source that does not have as many channels as this side.</summary>
internal static class ChannelCount
{
    /// <summary>Makes it.</summary>
    /// <param name="opened">Channels of the source, as far as is known.</param>
    /// <param name="expected">Channels here; 0 with multifd off.</param>
    /// <param name="within">After which time no more are waited for; null when there may be more than are known.</param>
    /// <returns>An error that names both counts.</returns>
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
