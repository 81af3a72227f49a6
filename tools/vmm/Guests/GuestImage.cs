using Iced.Intel;
using Vmm.Core.Errors;

namespace Vmm.Tools.Cli.Guests;

/// <summary>Turns assembled code into the flat binaries that <c>--kernel</c> takes.</summary>
internal static class GuestImage
{
    /// <summary>Where flat binaries go and start.</summary>
    internal const ulong FlatAddress = 0x100000;

    /// <summary>What <c>--kernel</c> starts with for a guest of our own.</summary>
    internal const string BuiltInPrefix = "builtin:";

    /// <summary>A guest of our own by its name.</summary>
    /// <param name="name">The name.</param>
    /// <param name="blocks">Sizes of the RAM blocks.</param>
    /// <exception cref="ConfigurationException">There is none of that name.</exception>
    internal static byte[] BuiltIn(string name, IReadOnlyList<ulong> blocks) => name switch
    {
        "busy" => BusyGuest.Build(blocks),
        "memcheck" when blocks[0] is > MemCheckGuest.FirstAddress and <= 1 << 30 => MemCheckGuest.Build(blocks[0]),
        "memcheck" => throw new ConfigurationException($"--kernel 'builtin:memcheck' needs more than 2 MiB and at most 1 GiB of RAM, found {blocks[0]} bytes"),
        "devcheck" => DevCheckGuest.Build(once: true),
        "smp" => SmpGuest.Build(),
        _ => throw new ConfigurationException($"--kernel 'builtin:{name}': not known; known: builtin:memcheck, builtin:devcheck, builtin:busy, builtin:smp"),
    };

    /// <summary>The code for its address.</summary>
    internal static byte[] Assemble(Assembler assembler, ulong address)
    {
        using var stream = new MemoryStream();
        assembler.Assemble(new StreamCodeWriter(stream), address);
        return stream.ToArray();
    }
}
