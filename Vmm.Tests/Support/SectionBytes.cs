using System.Text.Json;
using Vmm.Core.SaveVm;
using Vmm.Core.VmStates;
using Vmm.Core.Wire;

namespace Vmm.Tests.Support;

/// <summary>Saves, loads and describes the bodies of declared sections in one call each.</summary>
internal static class SectionBytes
{
    public static byte[] Save(IVmStateSection section, VmDescJson? desc = null)
    {
        var channel = new MemoryChannel();
        using var f = new QemuFileWriter(channel);
        section.Save(f, desc);
        f.Flush();
        return channel.Written;
    }

    public static byte[] Save<T>(VmStateDescription<T> description, T owner) where T : class => Save(description.Bind(owner));

    /// <summary>The section's members of VMDESC as one JSON object.</summary>
    public static string Describe(IVmStateSection section, VmDescOptions? options = null)
    {
        var desc = new VmDescJson(options);
        desc.StartObject();
        Save(section, desc);
        desc.EndObject();
        return desc.ToString();
    }

    public static string Describe<T>(VmStateDescription<T> description, T owner, VmDescOptions? options = null) where T : class =>
        Describe(description.Bind(owner), options);

    /// <summary>Loads a body and checks that the load consumed all of it.</summary>
    public static void Load(IVmStateSection section, byte[] body, int? version = null, bool inSingleBytes = false)
    {
        var memory = new MemoryChannel(body);
        var f = new QemuFileReader(inSingleBytes ? new OneByteChannel(memory) : memory) { Section = $"{section.Name}/0" };
        section.Load(f, version ?? section.VersionId);
        Assert.That(f.Position, Is.EqualTo(body.Length), "bytes consumed");
    }

    public static void Load<T>(VmStateDescription<T> description, T owner, byte[] body, int? version = null) where T : class =>
        Load(description.Bind(owner), body, version);

    /// <summary>Loads a body that a footer follows, as in the stream. The footer shows whether the load stopped at the body's end.</summary>
    public static void LoadFramed(IVmStateSection section, ReadOnlySpan<byte> bytes, int version)
    {
        var f = new QemuFileReader(new MemoryChannel(bytes.ToArray())) { Section = $"{section.Name}/0" };
        section.Load(f, version);
        byte footer = f.ReadByte();
        if (footer != 0x7e) throw f.Bad("footer", "0x7e", $"0x{footer:x2}");
        uint id = f.ReadUInt32();
        if (id != 0) throw f.Bad("footer", "id 0", $"{id}");
    }

    public static byte[] Frame(byte[] body) => [.. body, 0x7e, 0, 0, 0, 0];

    /// <summary>The length of a body that VMDESC gives (stream 2.6).</summary>
    public static long DescribedLength(string desc)
    {
        using JsonDocument json = JsonDocument.Parse(desc);
        return Length(json.RootElement);
    }

    public static byte[] Hex(string text) => Convert.FromHexString(text.Replace(" ", "", StringComparison.Ordinal).ReplaceLineEndings(""));

    private static long Length(JsonElement vmsd)
    {
        long sum = 0;
        foreach (JsonElement field in vmsd.GetProperty("fields").EnumerateArray())
            sum += field.GetProperty("size").GetInt64() * (field.TryGetProperty("array_len", out JsonElement n) ? n.GetInt64() : 1);
        if (vmsd.TryGetProperty("subsections", out JsonElement subs))
            foreach (JsonElement sub in subs.EnumerateArray())
                sum += 2 + sub.GetProperty("vmsd_name").GetString()!.Length + 4 + Length(sub);
        return sum;
    }
}
