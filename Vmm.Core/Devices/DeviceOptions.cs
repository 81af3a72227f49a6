using System.Globalization;
using Vmm.Core.Errors;

namespace Vmm.Core.Devices;

/// <summary>
/// Options of one device as <c>key=value</c> pairs in QEMU's syntax: <c>TYPE[,key=value]...</c>, where a doubled comma stands for one comma. A read
/// marks its option as used, and names it if it throws. Not thread-safe.
/// </summary>
public sealed class DeviceOptions
{
    private readonly Dictionary<string, string> _values = new(StringComparer.Ordinal);
    private readonly HashSet<string> _used = new(StringComparer.Ordinal);

    /// <summary>Makes options.</summary>
    /// <param name="typeName">Device type, as in <c>--device TYPE</c>.</param>
    /// <param name="values">The pairs; null for none.</param>
    /// <exception cref="ConfigurationException">A key is there twice.</exception>
    public DeviceOptions(string typeName, IEnumerable<KeyValuePair<string, string>>? values = null)
    {
        TypeName = typeName;
        foreach ((string key, string value) in values ?? [])
            if (!_values.TryAdd(key, value)) throw new ConfigurationException($"device '{typeName}': option '{key}' is given twice");
    }

    /// <summary>Device type.</summary>
    public string TypeName { get; }

    /// <summary>The device's id: the option <c>id</c>, or the type's name without it.</summary>
    public string Id => GetString("id", TypeName);

    /// <summary>Parses <c>TYPE[,key=value]...</c>.</summary>
    /// <exception cref="ConfigurationException">The type is missing, a pair has no <c>=</c>, or a key is there twice.</exception>
    public static DeviceOptions Parse(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        string[] parts = OptionList.Split(text);
        if (parts[0].Length == 0 || parts[0].Contains('=')) throw new ConfigurationException($"device option '{text}' must start with a device type");
        return new DeviceOptions(parts[0], parts.Skip(1).Select(p => OptionList.Pair(p, $"device '{parts[0]}'")));
    }

    /// <summary>Copies the options for a second device of the same kind; options that are marked as used stay marked.</summary>
    public DeviceOptions Copy()
    {
        var copy = new DeviceOptions(TypeName, _values);
        copy._used.UnionWith(_used);
        return copy;
    }

    /// <summary>Reads a string; <paramref name="fallback"/> if the option is absent.</summary>
    public string GetString(string key, string fallback) => TryGet(key, out string? v) ? v! : fallback;

    /// <summary>Reads a mandatory string.</summary>
    /// <exception cref="ConfigurationException">The option is absent.</exception>
    public string GetRequired(string key) =>
        TryGet(key, out string? v) ? v! : throw new ConfigurationException($"device '{TypeName}': option '{key}' is missing");

    /// <summary>Reads on or off; <paramref name="fallback"/> if the option is absent.</summary>
    /// <exception cref="ConfigurationException">The value is neither on nor off.</exception>
    public bool GetBool(string key, bool fallback) =>
        !TryGet(key, out string? v) ? fallback : OptionList.Bool(v!, $"device '{TypeName}': option '{key}'");

    /// <summary>
    /// Reads an unsigned number up to <paramref name="max"/>, in decimal or with 0x; <paramref name="fallback"/> if the option is absent.
    /// </summary>
    /// <exception cref="ConfigurationException">The value is not a number, or too large.</exception>
    public ulong GetUInt64(string key, ulong fallback, ulong max = ulong.MaxValue)
    {
        if (!TryGet(key, out string? v)) return fallback;
        bool ok = v!.StartsWith("0x", StringComparison.OrdinalIgnoreCase)
            ? ulong.TryParse(v.AsSpan(2), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out ulong n)
            : ulong.TryParse(v, NumberStyles.None, CultureInfo.InvariantCulture, out n);
        return ok && n <= max ? n : throw new ConfigurationException($"device '{TypeName}': option '{key}' expects a number up to {max}, found '{v}'");
    }

    /// <summary>Reads a size with an optional suffix K, M, G or T; <paramref name="fallback"/> if the option is absent.</summary>
    /// <returns>The size, bytes.</returns>
    /// <exception cref="ConfigurationException">The value is not a size.</exception>
    public ulong GetSizeBytes(string key, ulong fallback) =>
        !TryGet(key, out string? v) ? fallback : OptionList.SizeBytes(v!, $"device '{TypeName}': option '{key}'");

    /// <summary>Throws if an option was never read.</summary>
    /// <exception cref="ConfigurationException">An option was never read; the message names it.</exception>
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
