using System.Reflection;
using System.Runtime.CompilerServices;

namespace Vmm.Tests.House;

/// <summary>A class that keeps much is a class that does much: over 15 fields need a reason, which stands here.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class FieldCountTests
{
    private const int MaxFields = 15;

    private static readonly Dictionary<string, string> s_reasons = new()
    {
        ["Serial16550"] = "the registers of the chip, as the guest sees them",
        ["Cmos"] = "the registers of the chip, as the guest sees them",
        ["KvmCpuState"] = "the items of a vCPU's state, one for each section of QEMU's",
        ["KvmVcpu"] = "a vCPU's thread, its mapping and its hand-over of accesses; they change together under one protocol",
        ["KvmAccelerator"] = "one object for each part of the machine that KVM emulates",
        ["Vm"] = "the root of a machine: the parts that everybody reaches through it",
        ["PatternWorkload"] = "the options of the workload, kept as they were given",
        ["RamSectionReader"] = "the viewer's counters, one for each kind of record",
        ["StreamParser"] = "the viewer's state machine: where in the stream it is, and the limits that it keeps",
        ["QmpServer"] = "the settings that a host may give, each with a default",
        ["OutgoingProgress"] = "figures: each is a member of query-migrate's answer",
        ["MigrationEngine"] = "the public face: settings, events and the attempt that runs; attempts keep their own state",
        ["VfioUserSession"] = "the parts of one served connection",
        ["VfioUserClient"] = "one connection with its twin socket, requests under way and descriptors; they share one lock",
        ["VfioUserExchange"] = "one request under way: what is sent, what is awaited, and by when",
    };

    [Test]
    public void AClassHasNoMoreThanFifteenFieldsWithoutAReason()
    {
        Assembly[] assemblies = [typeof(Vmm.Core.Devices.Vm).Assembly, typeof(Vmm.Migration.MigrationServiceExtensions).Assembly, typeof(Vmm.Devices.Vfio.VfioPlugin).Assembly];
        var counts = assemblies.SelectMany(static a => a.GetTypes()).Where(IsOrdinary).Select(static t => (Type: t, Count: Fields(t))).ToList();
        Assert.That(string.Join('\n', counts.Where(c => c.Count > MaxFields && !s_reasons.ContainsKey(c.Type.Name)).Select(static c => $"{c.Type.FullName}: {c.Count}")), Is.Empty);
        Assert.That(s_reasons.Keys.Except(counts.Where(static c => c.Count > MaxFields).Select(static c => c.Type.Name)), Is.Empty, "a reason that is needed no longer");
    }

    /// <summary>Records are data, and structures are laid out by somebody else.</summary>
    private static bool IsOrdinary(Type type) =>
        type is { IsClass: true } && !type.IsDefined(typeof(CompilerGeneratedAttribute)) && !type.Name.Contains('<') && type.GetMethod("<Clone>$") is null;

    private static int Fields(Type type) =>
        type.GetFields(BindingFlags.Instance | BindingFlags.Public | BindingFlags.NonPublic | BindingFlags.DeclaredOnly).Length;
}
