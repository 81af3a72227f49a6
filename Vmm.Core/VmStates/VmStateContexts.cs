using System.Text;
using Vmm.Core.Errors;
using Vmm.Core.Wire;

namespace Vmm.Core.VmStates;

/// <summary>The path of the field at work, for error messages. An exception does not unwind it, so that the message still finds the path.</summary>
internal sealed class VmStatePath
{
    private readonly List<(string Name, int Index)> _steps = [];

    internal int Depth { get; private set; }

    internal void EnterDescription(string name, bool nested)
    {
        if (++Depth > WireLimits.VmStateDepth)
            throw new StreamLimitException($"state '{this}': nesting deeper than {WireLimits.VmStateDepth} (WireLimits.VmStateDepth)");
        _steps.Add((nested ? "" : name, -1));
    }

    internal void LeaveDescription()
    {
        Depth--;
        Leave();
    }

    internal void EnterField(string name) => _steps.Add((name, -1));

    internal void Element(int index) => _steps[^1] = (_steps[^1].Name, index);

    internal void Leave() => _steps.RemoveAt(_steps.Count - 1);

    public override string ToString()
    {
        var text = new StringBuilder();
        foreach ((string name, int index) in _steps)
        {
            if (name.Length == 0) continue;
            if (text.Length > 0) text.Append('/');
            text.Append(name);
            if (index >= 0) text.Append('[').Append(index).Append(']');
        }
        return text.ToString();
    }
}

/// <summary>State of one save; lives as long as the body of one section. One thread.</summary>
internal sealed class VmStateSaver(QemuFileWriter file)
{
    internal QemuFileWriter File => file;

    internal VmStatePath Path { get; } = new();

    /// <summary>Checks a count or size that the device itself supplied, before the save writes it.</summary>
    internal int Checked(long value, long max, string unit) => value >= 0 && value <= max
        ? (int)value
        : throw new DeviceStateException($"cannot save '{Path}': expected 0 to {max} {unit}, found {value}");

    /// <summary>Runs a hook; if the hook throws, the save fails with an error that names it.</summary>
    internal void Hook(string hook, Action call) => VmStateHooks.Run("save", Path, hook, call);
}

/// <summary>
/// State of one load, which each <see cref="VmStateType{TValue}"/> gets; lives as long as the body of one section. One thread.
/// </summary>
internal sealed class VmStateLoader
{
    internal VmStateLoader(QemuFileReader file) => File = file;

    /// <summary>The stream; the next byte is the first of the value to read.</summary>
    public QemuFileReader File { get; }

    internal VmStatePath Path { get; } = new();

    /// <summary>Makes an exception that names section, field path, offset, expected and found.</summary>
    /// <param name="offset">Stream offset of the offending bytes.</param>
    /// <param name="expected">What the field requires.</param>
    /// <param name="found">What the bytes hold.</param>
    /// <returns>The exception, to throw.</returns>
    public StreamFormatException Bad(long offset, string expected, string found) => File.Bad($"field '{Path}'", expected, found, offset);

    /// <summary>Makes an exception for a valid stream that does not fit this device.</summary>
    internal IncompatibleStateException Incompatible(long offset, string what, string expected, string found) =>
        new($"section '{File.Section}', offset {offset}: '{Path}': {what}: expected {expected}, found {found}")
        {
            Section = File.Section, Offset = offset, Expected = expected, Found = found,
        };

    /// <summary>Checks a count or size from the stream: against the limit first, then against the target's storage.</summary>
    internal int Checked(long value, long max, string unit)
    {
        if (value > WireLimits.VmStateElements)
            throw File.Over($"field '{Path}' of {value} {unit}", WireLimits.VmStateElements, nameof(WireLimits.VmStateElements));
        return value >= 0 && value <= max ? (int)value : throw Bad(File.Position, $"0 to {max} {unit}", $"{value}");
    }

    internal void Hook(string hook, Action call) => VmStateHooks.Run($"load section '{File.Section}', offset {File.Position},", Path, hook, call);
}

internal static class VmStateHooks
{
    internal static void Run(string what, VmStatePath path, string hook, Action call)
    {
        try
        {
            call();
        }
        catch (Exception e) when (e is not OperationCanceledException)
        {
            throw new DeviceStateException($"cannot {what} '{path}': {hook} failed: {e.Message}", e);
        }
    }
}

/// <summary>The marker bytes of pointer arrays (stream 2.5).</summary>
internal static class VmStatePointers
{
    internal const byte Null = 0x30;
    internal const byte Present = 0x31;
}
