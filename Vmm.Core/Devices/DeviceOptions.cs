using System.Globalization;
using Vmm.Core.Errors;

namespace Vmm.Core.Devices;

/// <summary>
/// Options of one device as <c>key=value</c> pairs, in QEMU's syntax: <c>TYPE[,key=value]...</c>, a doubled comma is a literal one. Typed
/// reads name the option in their errors and mark it as used. Not thread-safe.
/// </summary>
public sealed class DeviceOptions
{
    private readonly Dictionary<string, string> _values = new(StringComparer.Ordinal);
    private readonly HashSet<string> _used = new(StringComparer.Ordinal);

    /// <summary>Makes options.</summary>
    /// <param name="typeName">Device type.</param>
    /// <param name="values">Pairs; a repeated key is refused.</param>
    public DeviceOptions(string typeName, IEnumerable<KeyValuePair<string, string>>? values = null)
    {
        TypeName = typeName;
        foreach ((string key, string value) in values ?? [])
            if (!_values.TryAdd(key, value)) throw new ConfigurationException($"device '{typeName}': option '{key}' is given twice");
    }

    /// <summary>Device type.</summary>
    public string TypeName { get; }

    /// <summary>The device's id; given as <c>id=</c> or the type's name.</summary>
    public string Id => GetString("id", TypeName);

    /// <summary>Parses <c>TYPE[,key=value]...</c>.</summary>
    /// <param name="text">The option's text.</param>
    /// <returns>The options.</returns>
    /// <exception cref="ConfigurationException">Bad syntax.</exception>
    public static DeviceOptions Parse(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        string[] parts = OptionList.Split(text);
        if (parts[0].Length == 0 || parts[0].Contains('=')) throw new ConfigurationException($"device option '{text}' must start with a device type");
        return new DeviceOptions(parts[0], parts.Skip(1).Select(p => OptionList.Pair(p, $"device '{parts[0]}'")));
    }

    /// <summary>Makes the same options, for a second device of the kind; what has been read so far counts as read there too.</summary>
    /// <returns>The copy.</returns>
    public DeviceOptions Copy()
    {
        var copy = new DeviceOptions(TypeName, _values);
        copy._used.UnionWith(_used);
        return copy;
    }

    /// <summary>Reads a string.</summary>
    /// <param name="key">Option.</param>
    /// <param name="fallback">Value when absent.</param>
    /// <returns>The value.</returns>
    public string GetString(string key, string fallback) => TryGet(key, out string? v) ? v! : fallback;

    /// <summary>Reads a mandatory string.</summary>
    /// <param name="key">Option.</param>
    /// <returns>The value.</returns>
    /// <exception cref="ConfigurationException">Absent.</exception>
    public string GetRequired(string key) =>
        TryGet(key, out string? v) ? v! : throw new ConfigurationException($"device '{TypeName}': option '{key}' is missing");

    /// <summary>Reads on/off.</summary>
    /// <param name="key">Option.</param>
    /// <param name="fallback">Value when absent.</param>
    /// <returns>The value.</returns>
    /// <exception cref="ConfigurationException">Neither on nor off.</exception>
    public bool GetBool(string key, bool fallback) =>
        !TryGet(key, out string? v) ? fallback : OptionList.Bool(v!, $"device '{TypeName}': option '{key}'");

    /// <summary>Reads an unsigned number, decimal or 0x.</summary>
    /// <param name="key">Option.</param>
    /// <param name="fallback">Value when absent.</param>
    /// <param name="max">Largest legal value.</param>
    /// <returns>The value.</returns>
    /// <exception cref="ConfigurationException">Not a number or too large.</exception>
    public ulong GetUInt64(string key, ulong fallback, ulong max = ulong.MaxValue)
    {
        if (!TryGet(key, out string? v)) return fallback;
        bool ok = v!.StartsWith("0x", StringComparison.OrdinalIgnoreCase)
            ? ulong.TryParse(v.AsSpan(2), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out ulong n)
            : ulong.TryParse(v, NumberStyles.None, CultureInfo.InvariantCulture, out n);
        return ok && n <= max ? n : throw new ConfigurationException($"device '{TypeName}': option '{key}' expects a number up to {max}, found '{v}'");
    }

    /// <summary>Reads a size with an optional K, M, G or T suffix.</summary>
    /// <param name="key">Option.</param>
    /// <param name="fallback">Bytes when absent.</param>
    /// <returns>Bytes.</returns>
    /// <exception cref="ConfigurationException">Not a size.</exception>
    public ulong GetSizeBytes(string key, ulong fallback) =>
        !TryGet(key, out string? v) ? fallback : OptionList.SizeBytes(v!, $"device '{TypeName}': option '{key}'");

    /// <summary>Refuses options that nobody read.</summary>
    /// <exception cref="ConfigurationException">Names the option.</exception>
    public void ThrowIfUnused()
    {
        string? unused = _values.Keys.FirstOrDefault(k => k != "id" && !_used.Contains(k));
        if (unused is not null) throw new ConfigurationException($"device '{TypeName}': unknown option '{unused}'");
    }

    private bool TryGet(string key, out string? value)
    {
        _used.Add(key);
        return _values.TryGetValue(key, out value);
    }
}
