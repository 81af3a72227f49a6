using Iced.Intel;
using Vmm.Core.Errors;

namespace Vmm.Tools.Cli.Guests;

/// <summary>Turns assembled code into the flat binaries that <c>--kernel</c> takes.</summary>
internal static class GuestImage
{
    /// <summary>Load address and entry point of flat binaries.</summary>
    internal const ulong FlatAddress = 0x100000;

    /// <summary>Prefix of <c>--kernel</c> for a built-in guest.</summary>
    internal const string BuiltInPrefix = "builtin:";

    /// <summary>Assembles the built-in guest of a name, for RAM blocks of these sizes.</summary>
    /// <exception cref="ConfigurationException">There is no guest of that name.</exception>
    internal static byte[] BuiltIn(string name, IReadOnlyList<ulong> blocks) => name switch
    {
        "busy" => BusyGuest.Build(blocks),
        "memcheck" when blocks[0] is > MemCheckGuest.FirstAddress and <= 1 << 30 => MemCheckGuest.Build(blocks[0]),
        "memcheck" => throw new ConfigurationException($"--kernel 'builtin:memcheck' needs more than 2 MiB and at most 1 GiB of RAM, found {blocks[0]} bytes"),
        "devcheck" => DevCheckGuest.Build(once: true),
        "smp" => SmpGuest.Build(),
        _ => throw new ConfigurationException($"--kernel 'builtin:{name}': not known; known: builtin:memcheck, builtin:devcheck, builtin:busy, builtin:smp"),
    };

    /// <summary>Assembles code for an address.</summary>
    internal static byte[] Assemble(Assembler assembler, ulong address)
    {
        using var stream = new MemoryStream();
        assembler.Assemble(new StreamCodeWriter(stream), address);
        return stream.ToArray();
    }
}
