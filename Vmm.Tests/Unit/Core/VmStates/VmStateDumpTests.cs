using System.Text.Json;
using Vmm.Core.Devices;
using Vmm.Core.VmStates;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Core.VmStates;

/// <summary>Our dump has the shape of QEMU's (stream 2.7), so QEMU's own checker can compare two of our dumps.</summary>
[TestFixture]
public sealed class VmStateDumpTests
{
    private sealed class Device
    {
        public uint A;
        public byte[] Raw = new byte[8];
        public ushort[] Table = new ushort[4];
    }

    private static readonly VmStateField<Device> s_a = VmState.UInt32<Device>("a", static d => ref d.A);
    private static readonly VmStateField<Device> s_table = VmState.Array<Device, ushort>("table", VmStateTypes.UInt16, 4, static d => d.Table);

    private static VmStateDescription<Device> Of(int version = 1, int minimum = 1, params VmStateField<Device>[] fields) =>
        new() { Name = "dev", VersionId = version, MinimumVersionId = minimum, Fields = fields };

    private static string Dump(IVmStateDescription description) => VmStateDump.Write("none", [("dev", description)]);

    [Test]
    public void TheShapeIsQemus()
    {
        VmStateDescription<Device> description = new()
        {
            Name = "dev", VersionId = 3, MinimumVersionId = 2,
            Fields =
            [
                s_a, s_table, VmState.Validate<Device>("a is fine", static (_, _) => true), VmState.Buffer<Device>("raw", 8, static d => d.Raw, since: 3, exists: static (_, _) => true),
                VmState.Struct<Device, Fifo8>("fifo", Fifo8.Description, static _ => new Fifo8(16)),
            ],
            Subsections = [new() { Name = "dev/more", Needed = static _ => false }],
        };
        Assert.That(Dump(description), Is.EqualTo("""
            {
              "vmschkmachine": {
                "Name": "none"
              },
              "dev": {
                "Name": "dev",
                "version_id": 3,
                "minimum_version_id": 2,
                "Description": {
                  "name": "dev",
                  "version_id": 3,
                  "minimum_version_id": 2,
                  "Fields": [
                    {
                      "field": "a",
                      "version_id": 0,
                      "field_exists": false,
                      "size": 4
                    },
                    {
                      "field": "table",
                      "version_id": 0,
                      "field_exists": false,
                      "num": 4,
                      "size": 2
                    },
                    {
                      "field": "raw",
                      "version_id": 3,
                      "field_exists": true,
                      "size": 8
                    },
                    {
                      "field": "fifo",
                      "version_id": 0,
                      "field_exists": false,
                      "size": 8,
                      "Description": {
                        "name": "Fifo8",
                        "version_id": 1,
                        "minimum_version_id": 1,
                        "Fields": [
                          {
                            "field": "data",
                            "version_id": 1,
                            "field_exists": false,
                            "size": 0
                          },
                          {
                            "field": "head",
                            "version_id": 0,
                            "field_exists": false,
                            "size": 4
                          },
                          {
                            "field": "num",
                            "version_id": 0,
                            "field_exists": false,
                            "size": 4
                          }
                        ]
                      }
                    }
                  ],
                  "Subsections": [
                    {
                      "name": "dev/more",
                      "version_id": 1,
                      "minimum_version_id": 1
                    }
                  ]
                }
              }
            }

            """));
    }

    [Test]
    public void ATypeWithTwoDescriptionsHasTwoEntries()
    {
        string text = VmStateDump.Write("none", [("dev", Of()), ("dev", Of())]);
        using JsonDocument json = JsonDocument.Parse(text);
        Assert.That(json.RootElement.EnumerateObject().Select(static p => p.Name), Is.EqualTo(new[] { "vmschkmachine", "dev", "dev#2" }));
    }

    [Test]
    public void TheSerialPortsDumpIsThatOfQemu()
    {
        using JsonDocument json = JsonDocument.Parse(VmStateDump.Write("none", [("isa-serial", SerialDevice.Description)]));
        JsonElement state = json.RootElement.GetProperty("isa-serial").GetProperty("Description").GetProperty("Fields")[0].GetProperty("Description");
        // From QEMU 11.1's -dump-vmstate, without the sizes of structs, which depend on its compiler.
        Assert.That(state.GetProperty("Fields").EnumerateArray().Select(Line), Is.EqualTo(new[]
        {
            "divider v2 2", "rbr v0 1", "ier v0 1", "iir v0 1", "lcr v0 1", "mcr v0 1", "lsr v0 1", "msr v0 1", "scr v0 1", "fcr_vmstate v3 1",
        }));
        Assert.That(state.GetProperty("Subsections").EnumerateArray().Select(static s => $"{s.GetProperty("name")}: {string.Join(", ", s.GetProperty("Fields").EnumerateArray().Select(Line))}"),
            Is.EqualTo(new[]
            {
                "serial/thr_ipending: thr_ipending v0 4", "serial/tsr: tsr_retry v0 4, thr v0 1, tsr v0 1", "serial/recv_fifo: recv_fifo v1 (data v1 0, head v0 4, num v0 4)",
                "serial/xmit_fifo: xmit_fifo v1 (data v1 0, head v0 4, num v0 4)", "serial/fifo_timeout_timer: fifo_timeout_timer v0 8",
                "serial/timeout_ipending: timeout_ipending v0 4", "serial/poll: poll_msl v0 4, modem_status_poll v0 8",
            }));

        static string Line(JsonElement f) => $"{f.GetProperty("field")} v{f.GetProperty("version_id")} "
            + (f.TryGetProperty("Description", out JsonElement d) ? $"({string.Join(", ", d.GetProperty("Fields").EnumerateArray().Select(Line))})" : f.GetProperty("size"));
    }

    [Test]
    public void QemusCheckerAcceptsAnExtension()
    {
        (int code, string output) = Check(Dump(Of(1, 1, s_a, s_table)), Dump(Of(2, 1, s_a, s_table, VmState.UInt32<Device>("b", static d => ref d.A, since: 2))));
        Assert.That((code, output), Is.EqualTo((0, "")));
    }

    [Test]
    public void QemusCheckerAcceptsOurDevicesAgainstThemselves()
    {
        string dump = VmStateDump.Write("none", [("scratch", ScratchDevice.Description), ("serial", SerialDevice.Description), ("timer", VmClock.Description)]);
        Assert.That(Check(dump, dump), Is.EqualTo((0, "")));
    }

    private static IEnumerable<TestCaseData> Incompatible()
    {
        yield return new TestCaseData(Dump(Of(1, 1, s_a)), "while dest has no further fields").SetArgDisplayNames("a field is missing");
        yield return new TestCaseData(Dump(Of(1, 1, s_table, s_a)), "expected field \"a\"").SetArgDisplayNames("fields changed places");
        yield return new TestCaseData(Dump(Of(1, 1, VmState.UInt16<Device>("a", static d => ref d.Table[0]), s_table)), "size mismatch").SetArgDisplayNames("a field has another size");
        yield return new TestCaseData(Dump(Of(0, 0, s_a, s_table)), "version error").SetArgDisplayNames("the version went back");
        yield return new TestCaseData(Dump(Of(3, 3, s_a, s_table)), "minimum version error").SetArgDisplayNames("the minimum is over the source's version");
        yield return new TestCaseData(VmStateDump.Write("none", []), "does not exist in dest").SetArgDisplayNames("the device is gone");
    }

    [TestCaseSource(nameof(Incompatible))]
    public void QemusCheckerFindsADeliberateIncompatibility(string destination, string complaint)
    {
        (int code, string output) = Check(Dump(Of(1, 1, s_a, s_table)), destination);
        Assert.That(code, Is.Not.Zero, output);
        Assert.That(output, Does.Contain(complaint));
    }

    private static (int ExitCode, string Output) Check(string source, string destination)
    {
        string? folder = Environment.GetEnvironmentVariable("VMM_QEMU_SCRIPTS");
        string script = Path.Combine(folder ?? "", "vmstate-static-checker.py");
        if (folder is null || !File.Exists(script))
        {
            string reason = $"VMM_QEMU_SCRIPTS must name the scripts folder of QEMU's sources; found '{folder}'";
            if (Environment.GetEnvironmentVariable("CI") is { Length: > 0 } ci && ci != "false") Assert.Fail(reason);
            Assert.Ignore(reason);
        }
        using var directory = new TempDirectory();
        File.WriteAllText(directory["src"], source);
        File.WriteAllText(directory["dst"], destination);
        (int status, string output, string errors) = Shell.Run("python3", script, "-s", directory["src"], "-d", directory["dst"]);
        Assert.That(errors, Is.Empty);
        return (status, output);
    }
}
